"""In which order the layers of a plan are quantized, and the statistics that each of them gets."""

import warnings
from collections.abc import Callable, Iterable, Iterator

from torch import nn

from ..layers import QuantLinear, Stats
from . import calibration as calibrate
from .chain import find_chain
from .errors import CalibrationError
from .plan import PlannedLayer
from .rules import ALL
from .sequential import Sequence

# Second moments of the layers calibrated in one pass over the data; more layers take more passes.
STATS_BYTES = 1 << 30


class Stages:
    """Layers that are quantized together, one lot after another.

    model: a function that gives the model as it is now; what comes out of `of` is to be quantized in it before the next
    is asked for. run: the calibration data; None: without. sequential: from block to block, where the model has blocks
    that hand on to one another. done: whether layers, by name, need no statistics, because their result is known.
    """

    def __init__(
        self,
        model: Callable[[], nn.Module],
        run: calibrate.Runner | None,
        sequential: bool,
        done: Callable[[Iterable[str]], bool] = lambda names: False,
    ):
        self.model, self.run, self.sequential, self.done = model, run, sequential, done

    def of(self, todo: Iterable[PlannedLayer]) -> Iterator[tuple[list[PlannedLayer], dict[str, Stats]]]:
        """(layers, statistics of their inputs by name) until all of `todo` have been there.

        Raises CalibrationError if the data does not run, or does not reach a layer that cannot do without.
        """
        by_name = {planned.name: planned for planned in todo}
        chain = None
        # An embedding gets ids, no activations.
        needs = {n: ALL[p.scheme_name].needs for n, p in by_name.items() if issubclass(ALL[p.scheme_name], QuantLinear)}
        # What only wants to know largest values or ranges gains nothing that pays for the passes.
        if self.run is not None and self.sequential and any("second_moment" in needed for needed in needs.values()):
            chain = find_chain(self.model(), {name for name, needed in needs.items() if needed}, self.run)
        inside: set[str] = set()
        if chain is not None:  # whose float activations it has kept, before anything is quantized
            sequence = Sequence(chain, self.model, needs, self.run, self.done)
            inside = sequence.layers
        for wave in _waves([p for n, p in by_name.items() if n not in inside], calibrated=self.run is not None):
            yield wave, self._collect(wave)
        if chain is not None:
            for names, stats in sequence.stages(changed=len(inside) < len(by_name)):
                wave = [by_name[name] for name in names]
                self._check_reached(wave, stats)
                yield wave, stats

    def _collect(self, wave: list[PlannedLayer]) -> dict[str, Stats]:
        wave = [p for p in wave if issubclass(ALL[p.scheme_name], QuantLinear)]
        if self.run is None or not wave or self.done(p.name for p in wave):
            return {}
        wanted, model = {p.name: ALL[p.scheme_name].needs for p in wave}, self.model()
        stats = calibrate.collect(model, {n: model.get_submodule(n) for n in wanted}, wanted, self.run)
        self._check_reached(wave, stats)
        return stats

    def _check_reached(self, wave: list[PlannedLayer], stats: dict[str, Stats]) -> None:
        missed = [planned for planned in wave if planned.name not in stats]
        if not missed or self.done(planned.name for planned in wave):
            return
        for planned in missed:
            if complaint := planned.scheme.needs_data():
                raise CalibrationError(
                    f"layer '{planned.label}': the calibration data does not reach it, and {complaint}"
                )
        names = ", ".join(p.label for p in missed[:3]) + (", ..." if len(missed) > 3 else "")
        warnings.warn(
            f"the calibration data did not reach {names} ({len(missed)} in all): quantized from the weights alone",
            stacklevel=4,
        )


def _waves(todo: Iterable[PlannedLayer], calibrated: bool) -> Iterator[list[PlannedLayer]]:
    """Layers whose statistics are collected in one pass over the data, bounded in memory."""
    wave: list[PlannedLayer] = []
    used = 0
    for planned in todo:
        moment = "second_moment" in ALL[planned.scheme_name].needs
        cost = 4 * planned.in_features**2 if calibrated and moment else 0
        if wave and used + cost > STATS_BYTES:
            yield wave
            wave, used = [], 0
        wave.append(planned)
        used += cost
    if wave:
        yield wave
