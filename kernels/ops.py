"""One torch op per scheme: schema, shapes, gradients, autocast, and which backend answers on which device.

``torch.ops.qgraft.{w8a32_linear, w8a16_linear, w8_group_linear, w8a8_linear, w4a16_linear, bitnet_linear, svdq_linear,
svdq_quantize}``. Declared with `torch.library.Library` rather than `custom_op`, which costs 30 microseconds more a call
on the host. No layer knows on which device it runs: the dispatcher picks `cpu/` for CPU tensors, `gpu/` for CUDA and
ROCm ones where Triton is installed and there is a kernel, and `reference.py` for any other device (with one warning,
because it is slow).
"""

import functools
import importlib.util
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from . import reference
from .cpu import grouped as cpu_grouped
from .cpu import linear as cpu

_lib = torch.library.Library("qgraft", "DEF")

_SVDQ_ARGS = (
    "Tensor x, Tensor qweight, Tensor scale, Tensor? group_scale, Tensor? smooth_factor, "
    "Tensor? proj_down, Tensor? proj_up, Tensor? bias, int group_size, bool rotate, int act_bits, "
    "bool act_zero_point=False"
)
_lib.define("w8a32_linear(Tensor x, Tensor qweight, Tensor scale, Tensor? bias) -> Tensor")
_lib.define("w8a16_linear(Tensor x, Tensor qweight, Tensor scale, Tensor? bias) -> Tensor")
_lib.define(
    "w8_group_linear(Tensor x, Tensor qweight, Tensor scale, Tensor? zero_point, Tensor? bias, "
    "int group_size) -> Tensor"
)
_lib.define(
    "w8a8_linear(Tensor x, Tensor qweight, Tensor scale, Tensor? zero_point, Tensor? act_scale, "
    "Tensor? act_zero_point, Tensor? bias, Tensor? smooth_factor=None, int rotation=0) -> Tensor"
)
_lib.define(
    "w4a16_linear(Tensor x, Tensor qweight, Tensor scale, Tensor? zero_point, Tensor? smooth_factor, "
    "Tensor? proj_down, Tensor? proj_up, Tensor? bias, int group_size, bool rotate) -> Tensor"
)
_lib.define("bitnet_linear(Tensor x, Tensor qweight, Tensor scale, Tensor? bias) -> Tensor")
_lib.define(f"svdq_linear({_SVDQ_ARGS}) -> Tensor")
_lib.define(
    "svdq_quantize(Tensor x, Tensor? smooth_factor, Tensor? proj_down, int padded, int group_size, "
    "bool rotate, bool two_level, int act_bits, bool act_zero_point=False) -> (Tensor, Tensor, Tensor)"
)

w8a32_linear = torch.ops.qgraft.w8a32_linear
w8a16_linear = torch.ops.qgraft.w8a16_linear
w8_group_linear = torch.ops.qgraft.w8_group_linear
w8a8_linear = torch.ops.qgraft.w8a8_linear
w4a16_linear = torch.ops.qgraft.w4a16_linear
bitnet_linear = torch.ops.qgraft.bitnet_linear
svdq_linear = torch.ops.qgraft.svdq_linear
svdq_quantize = torch.ops.qgraft.svdq_quantize


def call(op: Callable, *args):
    """op(*args), past the part that is there for gradients where none are wanted: it is written in Python, and takes as
    long as a small layer. What torch.compile and torch.export trace is the op as it is."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


# ---- backends -------------------------------------------------------------------------------------------------------


@functools.cache
def _warn_slow(what: str, device: str) -> None:
    warnings.warn(
        f"qgraft: no kernel of {what} for device '{device}', so it runs in plain torch: right, but slow"
        + (". Install triton to run it on this GPU." if device == "cuda" and not _HAS_TRITON else "."),
        stacklevel=2,
    )


def _with_warning(name: str, function: Callable) -> Callable:
    @functools.wraps(function)
    def run(x: Tensor, *args):
        _warn_slow(name, x.device.type)
        return function(x, *args)

    return run


def _register(name: str, fallback: Callable, cpu_kernel: Callable, gpu_kernel: Callable | None) -> None:
    _lib.impl(name, _with_warning(name, fallback), "CompositeExplicitAutograd")
    _lib.impl(name, cpu_kernel, "CPU")
    if gpu_kernel is not None:
        _lib.impl(name, gpu_kernel, "CUDA")


# Triton is looked for, not imported: importing it costs a second that a CPU user should not pay.
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def _gpu(module: str, function: str) -> Callable | None:
    if not _HAS_TRITON:
        return None

    @functools.cache
    def load() -> Callable:
        kernel = getattr(importlib.import_module(f".gpu.{module}", __package__), function)
        first_use = importlib.import_module(".gpu.first_use", __package__)
        return first_use.tuned(kernel) if first_use.asked_for() and function.endswith("_linear") else kernel

    def run(*args):
        return load()(*args)

    return run


_register("w8a32_linear", reference.w8_linear, cpu.w8a32_linear, _gpu("w8a32", "w8a32_linear"))
_register("w8a16_linear", reference.w8_linear, cpu.w8a16_linear, _gpu("w8a16", "w8a16_linear"))
_register(
    "w8_group_linear",
    reference.w8_group_linear,
    cpu_grouped.w8_group_linear,
    _gpu("w8_group", "w8_group_linear"),
)
_register("w8a8_linear", reference.w8a8_linear, cpu.w8a8_linear, _gpu("w8a8", "w8a8_linear"))
_register("w4a16_linear", reference.w4a16_linear, cpu.w4a16_linear, _gpu("w4a16", "w4a16_linear"))
_register("bitnet_linear", reference.bitnet_linear, cpu.bitnet_linear, _gpu("bitnet", "bitnet_linear"))
_register("svdq_linear", reference.svdq_linear, cpu.svdq_linear, _gpu("svdq", "svdq_linear"))
_register("svdq_quantize", reference.svdq_quantize, cpu.svdq_quantize, _gpu("svdq", "svdq_quantize"))


# ---- shapes ---------------------------------------------------------------------------------------------------------


def _fake_linear(x: Tensor, qweight: Tensor, *_) -> Tensor:
    return x.new_empty(x.shape[0], qweight.shape[0])


def _fake_quantize(x, smooth_factor, proj_down, padded, group_size, rotate, two_level, act_bits, act_zero_point=False):
    m = x.shape[0]
    groups = 1 if two_level or act_bits == 8 else padded // group_size
    rank = 0 if proj_down is None else proj_down.shape[1]
    return (
        x.new_empty(m, padded, dtype=torch.int8),
        x.new_empty(m, groups, dtype=torch.float32),
        x.new_empty(m, rank, dtype=torch.float32),
    )


for _name in (
    "w8a32_linear",
    "w8a16_linear",
    "w8_group_linear",
    "w8a8_linear",
    "w4a16_linear",
    "bitnet_linear",
    "svdq_linear",
):
    torch.library.register_fake(f"qgraft::{_name}", _fake_linear, lib=_lib)
torch.library.register_fake("qgraft::svdq_quantize", _fake_quantize, lib=_lib)


# ---- gradients ------------------------------------------------------------------------------------------------------
# To x exactly as through the dequantized layer (rounding of activations passes gradients straight through), and to
# the bias. x itself is not saved. The codes are not trained.


def _save_w8(ctx, inputs, output) -> None:
    _, qweight, scale, bias = inputs
    ctx.save_for_backward(qweight, scale)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _grad_bias(ctx, grad: Tensor, index: int) -> Tensor | None:
    return grad.float().sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[index] else None


def _backward_w8(ctx, grad: Tensor):
    qweight, scale = ctx.saved_tensors
    grad_x = None
    if ctx.needs_input_grad[0]:
        grad_x = ((grad.float() * scale) @ qweight.float()).to(grad.dtype)
    return grad_x, None, None, _grad_bias(ctx, grad, 3)


def _save_w8_group(ctx, inputs, output) -> None:
    _, qweight, scale, zero_point, bias, ctx.group_size = inputs
    ctx.save_for_backward(qweight, scale, zero_point)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward_w8_group(ctx, grad: Tensor):
    grad_x = None
    if ctx.needs_input_grad[0]:
        weight = reference.w8_group_dequantize(*ctx.saved_tensors, ctx.group_size)
        grad_x = (grad.float() @ weight).to(grad.dtype)
    return grad_x, None, None, None, _grad_bias(ctx, grad, 4), None


def _save_svdq(ctx, inputs, output) -> None:
    x, *tensors, bias, group_size, rotate, _, _ = inputs
    ctx.save_for_backward(*tensors)
    ctx.in_features, ctx.group_size, ctx.rotate = x.shape[1], group_size, rotate
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward_svdq(ctx, grad: Tensor):
    grad_x = None
    if ctx.needs_input_grad[0]:
        weight = reference.svdq_dequantize(ctx.in_features, *ctx.saved_tensors, ctx.group_size, ctx.rotate)
        grad_x = (grad.float() @ weight).to(grad.dtype)
    return grad_x, None, None, None, None, None, None, _grad_bias(ctx, grad, 7), None, None, None, None


def _save_w8a8(ctx, inputs, output) -> None:
    x, qweight, scale, zero_point, _, _, bias, smooth_factor, ctx.rotation = inputs
    ctx.save_for_backward(qweight, scale, zero_point, smooth_factor)
    ctx.in_features = x.shape[1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward_w8a8(ctx, grad: Tensor):
    grad_x = None
    if ctx.needs_input_grad[0]:
        weight = reference.w8a8_dequantize(ctx.in_features, *ctx.saved_tensors, ctx.rotation)
        grad_x = (grad.float() @ weight).to(grad.dtype)
    return grad_x, None, None, None, None, None, _grad_bias(ctx, grad, 6), None, None


def _save_w4a16(ctx, inputs, output) -> None:
    x, *tensors, bias, group_size, rotate = inputs
    ctx.save_for_backward(*tensors)
    ctx.in_features, ctx.group_size, ctx.rotate = x.shape[1], group_size, rotate
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward_w4a16(ctx, grad: Tensor):
    grad_x = None
    if ctx.needs_input_grad[0]:
        weight = reference.w4a16_dequantize(ctx.in_features, *ctx.saved_tensors, ctx.group_size, ctx.rotate)
        grad_x = (grad.float() @ weight).to(grad.dtype)
    return grad_x, None, None, None, None, None, None, _grad_bias(ctx, grad, 7), None, None


def _save_bitnet(ctx, inputs, output) -> None:
    x, qweight, scale, bias = inputs
    ctx.save_for_backward(qweight, scale)
    ctx.in_features = x.shape[1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward_bitnet(ctx, grad: Tensor):
    grad_x = None
    if ctx.needs_input_grad[0]:
        weight = reference.bitnet_dequantize(ctx.in_features, *ctx.saved_tensors)
        grad_x = (grad.float() @ weight).to(grad.dtype)
    return grad_x, None, None, _grad_bias(ctx, grad, 3)


for _name in ("w8a32_linear", "w8a16_linear"):
    torch.library.register_autograd(f"qgraft::{_name}", _backward_w8, setup_context=_save_w8, lib=_lib)
torch.library.register_autograd("qgraft::w8_group_linear", _backward_w8_group, setup_context=_save_w8_group, lib=_lib)
torch.library.register_autograd("qgraft::w8a8_linear", _backward_w8a8, setup_context=_save_w8a8, lib=_lib)
torch.library.register_autograd("qgraft::w4a16_linear", _backward_w4a16, setup_context=_save_w4a16, lib=_lib)
torch.library.register_autograd("qgraft::bitnet_linear", _backward_bitnet, setup_context=_save_bitnet, lib=_lib)
torch.library.register_autograd("qgraft::svdq_linear", _backward_svdq, setup_context=_save_svdq, lib=_lib)


# ---- autocast -------------------------------------------------------------------------------------------------------
# `register_autocast` would cast every float argument, and a scale in bfloat16 is a wrong scale. Only x is cast.


def _autocast(name: str, device: str, wanted: Callable[[str], torch.dtype]) -> None:
    op = getattr(torch.ops.qgraft, name)
    key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def run(x: Tensor, *args):
        with torch._C._ExcludeDispatchKeyGuard(key):
            return op(x.to(wanted(device)), *args)

    _lib.impl(name, run, f"Autocast{device.upper()}")


for _device in ("cpu", "cuda"):
    _autocast("w8a32_linear", _device, lambda device: torch.float32)  # its promise is float32
    _autocast("w8a16_linear", _device, torch.get_autocast_dtype)
    _autocast("w8_group_linear", _device, torch.get_autocast_dtype)
    _autocast("w8a8_linear", _device, torch.get_autocast_dtype)
    _autocast("w4a16_linear", _device, torch.get_autocast_dtype)
    _autocast("bitnet_linear", _device, torch.get_autocast_dtype)
    _autocast("svdq_linear", _device, torch.get_autocast_dtype)
