"""1x1 convolutions as the linear layers that they are: over the channels, for every pixel that the stride meets.

conv(x)[b, :, i, j] = W x[b, :, i sh, j sw] + bias        W (N, K) is the weight (N, K, 1, 1)
"""

from torch import Tensor, nn


def is_pointwise(module: nn.Module) -> bool:
    """Whether it is an `nn.Conv2d`, or a subclass, that sees one pixel at a time: 1x1, no padding, one group."""
    return (
        isinstance(module, nn.Conv2d)
        and tuple(module.kernel_size) == (1, 1)
        and module.groups == 1
        and module.padding in ((0, 0), "valid", "same")
    )


def features_last(x: Tensor, stride: tuple[int, int]) -> Tensor:
    """(*, K, H, W) -> (*, H', W', K), the pixels that the stride meets; a view."""
    return x[..., :: stride[0], :: stride[1]].movedim(-3, -1)


def features_first(y: Tensor, x: Tensor) -> Tensor:
    """(*, H', W', N) -> (*, N, H', W'), in memory as the input x is: channels last if it was, else contiguous."""
    y = y.movedim(-1, -3)
    return y.contiguous() if x.is_contiguous() else y
