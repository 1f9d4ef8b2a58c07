"""What an error in a layer's output does to the model's output, to first order, for all layers in one pass.

A layer that is off by dy moves the model's output z by J dy, J being the Jacobian. What that costs is a quadratic form
in J dy, and the mean of (g . dy)^2 over random gradients g estimates it:

    a language model    KL divergence from the float model, in nats per token. g is the gradient of log p(t), t drawn
                        from the model's own distribution p: the Fisher information (Amari 1998; Kunstner et al. 2019)
    any other           |dz|^2 / |z|^2 of the first tensor that it returns. g is the gradient of r . z, r random signs
                        (Hutchinson 1990)

The gradients are those at the float model, so each layer is judged as if it were the only one, and the effects of all
add up. Errors of different tokens are taken as independent.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import QuantLayer
from .calibration import Runner
from .errors import CalibrationError
from .kinds import as_linear, float_weight

TOKENS, TOKENS_PER_PASS = 512, 64  # of each layer, that errors are measured on
KL, RELATIVE = "KL divergence, nats per token", "relative error of the output, squared"


@dataclass
class Probe:
    """Tokens of one layer: its inputs x (T, K), and the gradients g (T, N) at its output, scaled so that the mean of
    (g . dy)^2 over the tokens is the cost of an error dy."""

    x: list[Tensor] = field(default_factory=list)
    g: list[Tensor] = field(default_factory=list)

    @torch.no_grad()
    def cost(self, module: nn.Module, layer: QuantLayer) -> float:
        """Of having `layer` in the place of the float `module`."""
        linear = as_linear(module)
        total = count = 0
        for x, g in zip(self.x, self.g, strict=True):
            wrong = layer(x).float() - linear(x).float()  # (T, N)
            total += (wrong * g).sum(-1).double().square().sum().item()
            count += len(x)
        return total / count


@dataclass(frozen=True)
class Probed:
    """probes: of every layer that the data reaches, by name. metric: what costs are measured in, KL or RELATIVE.
    siblings: all layers in groups of those that read the same input in the same module, such as q, k and v."""

    probes: dict[str, Probe]
    metric: str
    siblings: list[list[str]]


def probe(model: nn.Module, layers: Mapping[str, nn.Module], run: Runner, seed: int = 0) -> Probed:
    """Run the data through the model, once forward and once backward.

    The model runs in eval mode with gradients to its activations, none to its parameters; flags come back afterwards.
    """
    watch = _Watch(model, layers, seed)
    with _differentiable(model), watch.hooks():
        run(model)
    if not watch.metric:
        raise CalibrationError("the calibration function never called the model itself: there is no output to look at")
    return Probed({name: p for name, p in watch.probes.items() if p.x}, watch.metric, watch.siblings())


@torch.no_grad()
def weight_error(module: nn.Module, layer: QuantLayer) -> float:
    """|W - W_dequantized|^2 / |W|^2."""
    weight = float_weight(module).float()
    error = torch.linalg.vector_norm(layer.dequantize() - weight, dtype=torch.float64)
    return (error / torch.linalg.vector_norm(weight, dtype=torch.float64).clamp_min(1e-30)).square().item()


class _Watch:
    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], seed: int):
        self.model, self.layers = model, layers
        self.random = torch.Generator().manual_seed(seed)
        self.probes = {name: Probe() for name in layers}
        self.calls: list[tuple[str, Tensor, Tensor]] = []  # of the pass under way: layer, input, output
        self.metric, self.passes = "", 0
        self.input_of: dict[str, Any] = {}  # in the first pass

    def siblings(self) -> list[list[str]]:
        found: dict[Any, list[str]] = {}
        for name in self.layers:
            key = (name.rpartition(".")[0], self.input_of[name]) if name in self.input_of else name
            found.setdefault(key, []).append(name)
        return list(found.values())

    @contextmanager
    def hooks(self) -> Iterator[None]:
        handles = [m.register_forward_hook(self._saw(name), with_kwargs=True) for name, m in self.layers.items()]
        handles.append(self.model.register_forward_hook(self._end))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _saw(self, name: str) -> Any:
        def see(module: nn.Module, args: tuple, kwargs: dict[str, Any], y: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                raise CalibrationError(
                    f"layer '{name or '(the model)'}' runs under torch.no_grad(): how its errors reach the output is "
                    "seen by gradients, so take the no_grad away from the model's forward"
                )
            x = args[0] if args else next(iter(kwargs.values()))
            # A leaf where nothing before it has a gradient, else a point on the way.
            y = y if y.requires_grad else y.detach().requires_grad_()
            # The call keeps x alive to the end of the pass, so that no other tensor can have its place.
            self.input_of.setdefault(name, (x.data_ptr(), x.shape, x.stride(), x._version, self.passes))
            self.calls.append((name, x.detach(), y))
            return y

        return see

    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        loss, unit, self.metric = self._loss(output)
        calls, self.calls = self.calls, []
        self.passes += 1
        wanted = [call for call in calls if sum(map(len, self.probes[call[0]].x)) < TOKENS]
        if not wanted:
            return
        gradients = torch.autograd.grad(loss, [y for _, _, y in wanted], allow_unused=True)
        for (name, x, _), g in zip(wanted, gradients, strict=True):
            if g is not None:
                x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1]).float()
                self._keep(self.probes[name], x, g * (unit * len(x)) ** 0.5)  # the errors of all its tokens add up

    def _keep(self, probe: Probe, x: Tensor, g: Tensor) -> None:
        want = min(TOKENS - sum(map(len, probe.x)), TOKENS_PER_PASS, len(x))
        if want > 0:
            rows = torch.randperm(len(x), generator=self.random)[:want].to(x.device)
            probe.x.append(x[rows])
            probe.g.append(g[rows])

    def _loss(self, output: Any) -> tuple[Tensor, float, str]:
        """What to differentiate, what the square of a change of it is multiplied by, and what costs are measured in."""
        logits = getattr(output, "logits", None)
        if isinstance(logits, Tensor) and logits.ndim == 3:
            log_p = logits.float().log_softmax(-1).flatten(0, 1)  # (T, V)
            drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=self.random).to(log_p.device)
            return log_p.gather(1, drawn).sum(), 0.5 / len(log_p), KL  # half the quadratic form, the mean over tokens
        z = _first_tensor(output)
        if z is None or not z.requires_grad:
            raise CalibrationError("the model's output holds no tensor that gradients reach its linear layers from")
        signs = torch.randint(0, 2, z.shape, generator=self.random).to(z.device) * 2.0 - 1
        norm = torch.linalg.vector_norm(z.detach(), dtype=torch.float64).item()
        return (z.float() * signs).sum(), max(norm, 1e-30) ** -2, RELATIVE


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return next((t for t in map(_first_tensor, values) if t is not None), None)


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    wanted = {p: p.requires_grad for p in model.parameters()}
    fused = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)  # it calls no layer, so there would be nothing to see
    try:
        for p in wanted:
            p.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for p, flag in wanted.items():
            p.requires_grad_(flag)
        for module, flag in training.items():
            module.training = flag
