"""Tensor parallel: each layer's weight spread over several devices, the outputs those of one.

    column   each process has some of the outputs:   y_r = x W_r^T            q, k, v, gate, up
    row      each process has some of the inputs:    y = sum over r of x_r W_r^T     o, down

After Megatron-LM (Shoeybi et al., arXiv 1909.08053), through `torch.distributed.tensor.parallel`: a column layer is
followed by a row layer, and each such pair costs one sum over the processes. The codes are sliced as they are, so that
nothing is quantized again.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn

from ..layers import QuantLinear
from ..layers.sharding import why_not_columns, why_not_rows
from ..recipes import pattern_matches, suggest
from .errors import PlanError, some

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

COLUMN, COLUMN_WHOLE, ROW, ROW_WHOLE = KNOWN = ("column", "column_whole", "row", "row_whole")
DEFAULT = {
    **dict.fromkeys(("*q_proj", "*k_proj", "*v_proj", "*gate_proj", "*up_proj"), COLUMN),
    **dict.fromkeys(("*o_proj", "*down_proj"), ROW),
}
# What transformers calls them, in its two majors.
STYLES = {
    "colwise": COLUMN,
    "colwise_rep": COLUMN_WHOLE,
    "colwise_gather_output": COLUMN_WHOLE,
    "rowwise": ROW,
    "rowwise_rep": ROW_WHOLE,
    "rowwise_split_input": ROW_WHOLE,
}
# What such modules hold stays whole in every process.
STAY_WHOLE = ("embedding_rowwise", "embedding_colwise", "replicate", "replicated_with_grad_allreduce")
# Of attention: each process computes whole heads.
HEADS = ("num_attention_heads", "num_key_value_heads")


def parallelize(model: nn.Module, mesh: "DeviceMesh", plan: Mapping[str, str] | None = None) -> nn.Module:
    """Spread the linear layers of a quantized model over the processes of a mesh, in place; returns the model.

    model: the same in every process, with its values, on the process's own device.
    mesh: of one dimension, as `torch.distributed.device_mesh.init_device_mesh("cuda", (8,))` makes it.
    plan: {pattern: style}, patterns as in recipes, the first that matches counts. "column" leaves each process its part
    of the outputs, "column_whole" gathers them; "row" takes x as a column layer leaves it, "row_whole" takes it whole.
    By default the model's own `tp_plan` if it has one (transformers), else q, k, v, gate and up by column, o and down
    by row. What nothing names stays whole in every process. Float `nn.Linear` layers are spread as well.

    The outputs are those of one process up to the rounding of float sums: where activations are quantized per token,
    a row layer first finds the token's largest magnitude over all processes, one more small exchange. Its bias is
    added by the first process.

    Raises PlanError with every problem before any layer is touched: a size that does not divide, a row that would be
    cut inside a group, a pattern that matches nothing.
    """
    from torch.distributed.tensor.parallel import parallelize_module

    from .parallel_styles import float_style, quantized_style

    if mesh.ndim != 1:
        raise PlanError(f"parallelize() takes a mesh of one dimension, got {mesh.ndim}: give one of them, mesh['tp']")
    styles = resolve(model, own_plan(model) if plan is None else plan, mesh.size(), required=plan is not None)
    if mesh.size() == 1:
        return model
    layers = {name: model.get_submodule(name) for name in styles}
    make = {n: (quantized_style if isinstance(m, QuantLinear) else float_style)(styles[n]) for n, m in layers.items()}
    return parallelize_module(model, mesh, make.get("", make))


def own_plan(model: nn.Module) -> dict[str, str]:
    """The `tp_plan` of a transformers model in our words, or the default; PlanError for styles that we do not have."""
    named = dict(getattr(model, "tp_plan", None) or {})
    if not named:
        return DEFAULT
    strange = [f"{name}: {style}" for name, style in named.items() if style not in (*STYLES, *STAY_WHOLE)]
    if strange:
        raise PlanError(f"the model's tp_plan has styles that are not known here ({some(strange)}): give a plan")
    return {name: STYLES[style] for name, style in named.items() if style in STYLES}


def resolve(model: nn.Module, plan: Mapping[str, str], parts: int, required: bool = True) -> dict[str, str]:
    """Name of each layer to spread -> its style; PlanError with every problem.

    required: whether each pattern has to match something.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (QuantLinear, nn.Linear))}
    problems = [
        f"plan: no style {s!r} (of {p!r}); there are {', '.join(KNOWN)}" for p, s in plan.items() if s not in KNOWN
    ]
    found: dict[str, str] = {}
    for pattern, style in plan.items():
        matched = [n for n, m in layers.items() if pattern_matches(pattern, n, type(m).__name__)]
        if required and not matched:
            near = suggest(pattern, layers)
            problems.append(f"plan: {pattern!r} matches no linear layer" + (f"; nearest: {near[0]}" if near else ""))
        for name in matched:
            found.setdefault(name, style)
    problems += [f"layer {n!r}, {s}: {why}" for n, s in found.items() if (why := _why_not(layers[n], s, parts))]
    config = getattr(model, "config", None)
    for name in HEADS if found else ():
        if (getattr(config, name, None) or 0) % parts:
            problems.append(f"the model's {name} is {getattr(config, name)}: not a multiple of {parts} processes")
    if problems:
        raise PlanError(some(problems, "\n", show=10))
    if not found:
        raise PlanError("no linear layer is named like those of the default plan: give plan={pattern: style}")
    return found


def _why_not(layer: nn.Module, style: str, parts: int) -> str:
    by_row = style in (ROW, ROW_WHOLE)
    if isinstance(layer, QuantLinear):
        return (why_not_rows if by_row else why_not_columns)(layer, parts)
    size, what = (layer.in_features, "inputs") if by_row else (layer.out_features, "outputs")
    return f"its {size} {what} cannot be cut into {parts} equal parts" if size % parts else ""
