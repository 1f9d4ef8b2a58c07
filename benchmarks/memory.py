"""How much memory a layer takes: counted from its tensors, and seen from outside, in the process's resident set.

The two check each other. Counting misses what a library keeps out of reach (packed weights in a cache of its
own); the resident set sees everything, but only to within a megabyte or so.
"""

import ctypes
import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
_CLEAR = Path("/proc/self/clear_refs")


def tensor_bytes(module: nn.Module) -> int:
    """Bytes of every tensor that can be reached from a module's attributes, each storage once.

    Other than `storage_bytes` of the layers it sees through tensor subclasses, and into objects that hold
    tensors without registering them, which is how most libraries keep scales and packed weights.
    """
    storages = {}
    for tensor in _tensors(module, set()):
        if tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        else:  # oneDNN's own packed layout has no storage to ask
            storages[id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(storages.values())


def held_by(make: Callable[[], T], device: str) -> tuple[T, int | None]:
    """What `make` returns, and by how many bytes the process (or the GPU's allocator) has grown for it.

    None where the system cannot tell, that is, on a CPU without Linux's /proc.
    """
    gc.collect()  # what others have left behind must not be freed in between
    before = _in_use(device)
    result = make()
    gc.collect()
    after = _in_use(device)
    return result, None if before is None or after is None else max(after - before, 0)


def peak_of(call: Callable[[], object], device: str) -> int | None:
    """By how many bytes memory in use rises, at most, while `call` runs: its scratch space and its result."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    before = _in_use(device)
    try:
        _CLEAR.write_text("5")  # the high-water mark starts again from here
    except OSError:
        return None
    call()
    peak = status("VmHWM")
    return None if before is None or peak is None else max(peak - before, 0)


def _in_use(device: str) -> int | None:
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    if sys.platform == "linux":
        # Freed blocks that the allocator keeps would hide growth, or look like it.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
    return status("VmRSS")


def status(field: str) -> int | None:
    """A line of the process's own /proc/self/status, in bytes; None where there is none."""
    status = Path("/proc/self/status")
    for line in status.read_text(encoding="utf-8").splitlines() if status.exists() else ():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    return None


def _tensors(item: Any, seen: set[int]) -> Iterator[Tensor]:
    if id(item) in seen:
        return
    seen.add(id(item))
    if isinstance(item, Tensor):
        inner = getattr(item, "__tensor_flatten__", None)
        if inner is None:
            yield item.detach() if type(item) is nn.Parameter else item
        else:
            for name in inner()[0]:
                yield from _tensors(getattr(item, name), seen)
        children = list(getattr(item, "__dict__", {}).values())
    elif isinstance(item, dict):
        children = list(item.values())
    elif isinstance(item, list | tuple | set):
        children = list(item)
    elif isinstance(item, nn.Module) or not (callable(item) or isinstance(item, ModuleType)):
        children = list(getattr(item, "__dict__", {}).values())
    else:
        return  # functions, classes and Python modules lead to everything there is
    for child in children:
        yield from _tensors(child, seen)
