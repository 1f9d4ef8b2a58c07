"""Several processes that quantize one model, as `torchrun` starts them: who does what, and how one's failure stops all.

    torchrun --nproc-per-node 4 -m qgraft quantize MODEL_DIR --recipe w4a8_svd --out out

The processes send each other a few words through the key-value store that torchrun runs, and no tensors: what they
make meets in the folder that is written, which on several machines must be one that all of them see.
"""

import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache, cached_property
from typing import Any

import torch
import torch.distributed as dist

from .errors import QuantizeError

POLL_SECONDS = 0.05
LINGER_SECONDS = 5
FAILED = "failed"
RUNS = itertools.count()


@cache
def _rendezvous(rank: int, world: int) -> dist.Store:
    store, _, _ = next(dist.rendezvous("env://", rank, world))
    return store


class Ranks:
    """This process among those of a run; alone, if torchrun did not start it.

    Every process makes its objects of this class in the same order: each is a run of its own.
    """

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.run = next(RUNS)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @cached_property
    def _store(self) -> dist.Store:
        return dist.PrefixStore(f"qgraft/{self.run}", _rendezvous(self.rank, self.world))

    def device(self, wanted: torch.device | str | None) -> torch.device | None:
        """ "cuda" without a number is the GPU of this process's own."""
        device = None if wanted is None else torch.device(wanted)
        if device is not None and device.type == "cuda" and device.index is None and self.world > 1:
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        return device

    def agree(self, key: str, value: Any) -> Any:
        """The JSON value that the first process gives, in all of them; a key is used once."""
        if self.world == 1:
            return value
        if self.is_first:
            self._store.set(key, json.dumps(value))
            return value
        while not self._store.check([key]):
            self.stop_if_one_failed()
            time.sleep(POLL_SECONDS)
        return json.loads(self._store.get(key))

    def meet(self, where: str) -> None:
        """Wait until all processes are here."""
        if self.world == 1:
            return
        count = self._store.add(where, 1)
        while count < self.world:
            self.stop_if_one_failed()
            time.sleep(POLL_SECONDS)
            count = self._store.add(where, 0)

    def leave(self) -> None:
        """The last meeting: rank 0, which may keep the store, goes when nobody needs it any more."""
        self.meet("leave")
        if self.world > 1:
            gone = self._store.add("gone", 1)
            while self.is_first and gone < self.world:
                time.sleep(POLL_SECONDS)
                gone = self._store.add("gone", 0)

    def share(self, work: str, items: list[Any]) -> Iterator[Any]:
        """The items that fall to this process: each takes the next one when it is free, so give the longest first."""
        if self.world == 1:
            yield from items
            return
        while (index := self._store.add(work, 1) - 1) < len(items):
            self.stop_if_one_failed()
            yield items[index]

    def stop_if_one_failed(self) -> None:
        """Raise QuantizeError with the message of a process that failed."""
        if self.world > 1 and self._store.check([FAILED]):
            raise QuantizeError(f"rank {self.rank} stops: {json.loads(self._store.get(FAILED))}")

    @contextmanager
    def together(self) -> Iterator[None]:
        """Inside, an error of one process reaches all others, when they next meet or take an item."""
        with _one_thread_each():
            try:
                yield
            except dist.DistError as error:
                raise QuantizeError(f"rank {self.rank} stops: rank 0 cannot be reached any more ({error})") from error
            except BaseException as error:
                if self.world > 1:
                    self._part(str(error) or type(error).__name__)
                raise

    def _part(self, words: str) -> None:
        """Let the others hear of a failure: rank 0 may keep the store, and torchrun ends all when the first is gone."""
        with suppress(dist.DistError):
            if not self._store.check([FAILED]):
                self._store.set(FAILED, json.dumps(f"rank {self.rank} failed: {words}"))
            self._store.add("stopped", 1)
            end = time.monotonic() + LINGER_SECONDS
            while self._store.add("stopped", 0) < self.world and time.monotonic() < end:
                time.sleep(POLL_SECONDS)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Sums of another number of threads round otherwise: one, unless OMP_NUM_THREADS says how many all should have.

    torchrun itself sets it to 1 for several processes, and leaves it alone for one.
    """
    if "RANK" not in os.environ or "OMP_NUM_THREADS" in os.environ:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def peak_memory() -> int | None:
    """The most bytes of memory that this process has had so far, mapped files included; None where nobody counts."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
