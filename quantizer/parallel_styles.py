"""Column and row parallel styles for quantized layers, as `parallelize_module` of torch takes them."""

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from ..layers import QuantLinear
from ..layers.sharding import columns, largest, needs_largest, rows, with_largest

WHOLE = "_whole"


def quantized_style(style: str) -> ParallelStyle:
    whole = style.endswith(WHOLE)
    return QuantColumns(gather=whole) if style.startswith("column") else QuantRows(split=whole)


def float_style(style: str) -> ParallelStyle:
    """The same for an `nn.Linear`."""
    if style.startswith("column"):
        return ColwiseParallel(output_layouts=Replicate() if style.endswith(WHOLE) else None)
    return RowwiseParallel(input_layouts=Replicate() if style.endswith(WHOLE) else None)


class QuantColumns(ParallelStyle):
    """Each process computes a part of the outputs (*, N) of a QuantLinear, from x that all have whole.

    gather: give every process the whole output.
    """

    def __init__(self, gather: bool = False):
        super().__init__()
        self.gather = gather

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        columns(module, device_mesh.get_local_rank(), device_mesh.size())

        def before(layer: QuantLinear, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = args[0]
            if x.requires_grad:  # each process has the gradient through its own outputs: the sum is the gradient
                x = DTensor.from_local(x, device_mesh, [Replicate()], run_check=False)
                x = x.to_local(grad_placements=[Partial()])
            return (x, *args[1:])

        def after(layer: QuantLinear, args: tuple[Any, ...], y: Tensor) -> Tensor:
            return _moved(y, device_mesh, Shard(-1), Replicate()) if self.gather else y

        return _spread(module, device_mesh, before, after)


class QuantRows(ParallelStyle):
    """Each process computes with a part of the inputs (*, K) of a QuantLinear, and all get the sum.

    split: x comes whole, and every process takes its part.
    """

    def __init__(self, split: bool = False):
        super().__init__()
        self.split = split

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        size = module.in_features // device_mesh.size()
        rows(module, device_mesh.get_local_rank(), device_mesh.size())
        dtype = module.dtype

        def before(layer: QuantLinear, args: tuple[Any, ...]) -> tuple[Any, ...]:
            nonlocal dtype
            x = args[0]
            dtype = x.dtype
            if self.split:
                x = _moved(x, device_mesh, Replicate(), Shard(-1))
            if x.shape[-1] != size:
                raise ValueError(
                    f"{type(layer).__name__} is spread by row and takes (*, {size}), its part of the inputs, got "
                    f"{tuple(x.shape)}; the style row_whole takes them whole"
                )
            if needs_largest(layer):
                x = with_largest(layer, x, _moved(largest(layer, x), device_mesh, Partial("max"), Replicate()))
            return (x, *args[1:])

        def after(layer: QuantLinear, args: tuple[Any, ...], y: Tensor) -> Tensor:
            return _moved(y, device_mesh, Partial(), Replicate()).to(dtype)

        return _spread(module, device_mesh, before, after)


def _moved(x: Tensor, mesh: DeviceMesh, now: Placement, wanted: Placement) -> Tensor:
    return DTensor.from_local(x, mesh, [now], run_check=False).redistribute(placements=[wanted]).to_local()


def _spread(module: nn.Module, mesh: DeviceMesh, before: Any, after: Any) -> nn.Module:
    # Innermost: what the user's own hooks see is x as it came and y as it goes.
    module.register_forward_pre_hook(before)
    module.register_forward_hook(after, prepend=True)
    module.spread_over = mesh.size()
    return module
