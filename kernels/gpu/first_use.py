"""Tiles tried when a layer's shape is first met: with QGRAFT_TUNE=1 in the environment, and never without.

What `qgraft warmup --tune` does ahead of time, for the shapes and numbers of tokens that really come. At most eight
tiles for a kernel and a shape; the best is kept on disk, even if it is the usual one, so that it is tried once on a
device, not once a process. All first calls of a process together wait for at most BUDGET seconds of it.
"""

import os
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from . import configs, tuning

BUDGET = 60.0

_left = BUDGET


def asked_for() -> bool:
    return os.environ.get("QGRAFT_TUNE") == "1"


def tuned(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`kernel(x, qweight, ...)`, which tries tiles at its first call for a device, type, shape and range of tokens."""
    seen = set()

    def run(x: Tensor, qweight: Tensor, *args) -> Tensor:
        y = kernel(x, qweight, *args)  # has the usual tile compiled, and any error raised
        key = (x.device, x.dtype, qweight.shape, tuning.token_range(x.shape[0]))
        if key not in seen and not _recording(x):
            seen.add(key)
            _try(lambda: kernel(x, qweight, *args), x)
        return y

    return run


def _recording(x: Tensor) -> bool:
    """Whether a CUDA graph is being recorded, which a measurement would become part of."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _try(run: Callable[[], Tensor], x: Tensor) -> None:
    global _left
    device = configs.device_name(x)
    if _left <= 0 or not device:  # the interpreter has no device
        return
    start = time.monotonic()
    rows = tuning.tune(run, tuning.seconds, untried_on=device, until=start + _left)
    _left -= time.monotonic() - start
    if rows:
        tuning.keep(device, rows)
    if _left <= 0:
        warnings.warn(
            f"qgraft: {BUDGET:.0f} seconds went into trying tiles, which is all that a process may take; the rest run "
            "with the usual ones. `qgraft warmup --tune` tries them for as long as it takes",
            stacklevel=2,
        )
