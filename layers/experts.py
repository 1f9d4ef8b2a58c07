"""The experts of a mixture as linear layers, one by one, where transformers (5 and later) fuses them into 3-D
parameters that no linear layer holds.

Its decorator `use_experts_implementation` declares what such a module computes, for each of the k experts e of a
token, however the module's own forward is written:

    h   = x up[e]^T + up_bias[e]                    up is gate_up_proj or up_proj, (E, F, H); (E, H, F) if transposed
    y   = gate(h) down[e]^T + down_bias[e]          gate: the module's _apply_gate, or act_fn alone
    out = sum of routing weight times y             y after post_expert_norm, if there is one
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

# What the decorator notes on each module.
FLAGS = ("num_experts", "has_gate", "has_bias", "is_transposed")


def is_fused(module: nn.Module) -> bool:
    """Whether the class is decorated so; a subclass with another forward is not."""
    home = getattr(type(module).forward, "__globals__", {}).get("__name__")  # of the decorator's own forward
    return home == "transformers.integrations.moe" and all(hasattr(module, flag) for flag in FLAGS)


def why_not_split(module: nn.Module) -> str:
    """What keeps a fused module from being split into its experts, or ""."""
    up, down = "gate_up_proj" if module.has_gate else "up_proj", "down_proj"
    expected = {up, down} | ({f"{up}_bias", f"{down}_bias"} if module.has_bias else set())
    found = {name: p for name, p in module._parameters.items() if p is not None}
    if "forward" in module.__dict__:
        return "its forward is replaced on the instance"
    if getattr(module, "_is_expert_parallel", False):
        return "its experts are spread over several devices"
    if set(found) != expected:
        return f"its parameters are {', '.join(sorted(found))} instead of {', '.join(sorted(expected))}"
    if any(p.ndim != (2 if name.endswith("_bias") else 3) for name, p in found.items()):
        return "its parameters are not one matrix for each expert"
    if {len(p) for p in found.values()} != {module.num_experts}:
        numbers = ", ".join(f"{name} {len(p)}" for name, p in found.items())
        return f"its parameters disagree about the number of experts, {module.num_experts}: {numbers}"
    if not all(type(p) is nn.Parameter and type(p.data) is Tensor and p.is_floating_point() for p in found.values()):
        return "its parameters are no plain float tensors"
    return ""


class Expert(nn.Module):
    """One expert: its linear layers, called as the float module calls its parameters."""


class Experts(nn.Module):
    """What takes the place of a fused module: experts.0.gate_up_proj, experts.0.down_proj, experts.1.gate_up_proj, ...

    Runs one expert after another, each on the tokens that the router sends it; the order of the sums is fixed.
    copy: False makes the weights views of the fused parameters.
    """

    def __init__(self, fused: nn.Module, copy: bool = True):
        super().__init__()
        for key, value in fused.__dict__.items():  # what _apply_gate may read
            if key not in self.__dict__:
                self.__dict__[key] = value
        self.kind = type(fused)
        self.up_name = "gate_up_proj" if fused.has_gate else "up_proj"
        for index in range(fused.num_experts):
            expert = Expert()
            expert.training = fused.training
            for name in (self.up_name, "down_proj"):
                expert.add_module(name, _linear(fused, name, index, copy))
            self.add_module(str(index), expert)
        for name, child in fused.named_children():
            self.add_module(name, child)

    def projections(self) -> Iterator[tuple[str, nn.Module]]:
        """The linear layers of all experts, float or quantized, by their names in this module."""
        for index in range(self.num_experts):
            for name, layer in self._modules[str(index)].named_children():
                yield f"{index}.{name}", layer

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (T, H), top_k_index (T, k) integer, top_k_weights (T, k) -> (T, H)."""
        k = top_k_index.shape[-1]
        ids = top_k_index.reshape(-1)  # (T * k,)
        order = ids.argsort(stable=True)
        counts = torch.bincount(ids, minlength=self.num_experts).tolist()
        rows = hidden_states[order // k].split(counts)
        parts = [self._run(index, x) for index, x in enumerate(rows) if len(x)]
        if not parts:
            return torch.zeros_like(hidden_states)
        pairs = torch.cat(parts)[order.argsort()]  # (T * k, H), in the order of ids
        out = (pairs * top_k_weights.reshape(-1, 1)).unflatten(0, (-1, k)).sum(1)
        return out.to(hidden_states.dtype)

    def _run(self, index: int, x: Tensor) -> Tensor:
        expert = self._modules[str(index)]
        h = getattr(expert, self.up_name)(x)
        y = expert.down_proj(self.kind._apply_gate(self, h) if self.has_gate else self.act_fn(h))
        return self.post_expert_norm(y) if getattr(self, "has_post_expert_norm", False) else y


def _linear(fused: nn.Module, name: str, index: int, copy: bool) -> nn.Linear:
    """The expert's slice of a parameter as a linear layer; a view of it, unless `copy`."""
    parameter = fused._parameters[name]
    weight = parameter.detach()[index]
    weight = weight.t() if fused.is_transposed else weight  # (N, K)
    n, k = weight.shape
    linear = nn.Linear(k, n, bias=False, device="meta")
    linear.training = fused.training
    weight = weight.clone(memory_format=torch.contiguous_format) if copy else weight
    linear.weight = nn.Parameter(weight, requires_grad=parameter.requires_grad)
    if fused.has_bias:
        bias = fused._parameters[f"{name}_bias"]
        part = bias.detach()[index]
        linear.bias = nn.Parameter(part.clone() if copy else part, requires_grad=bias.requires_grad)
    return linear
