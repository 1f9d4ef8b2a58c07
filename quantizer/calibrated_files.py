"""Calibrate and quantize a model that is larger than memory: its blocks are read from files one at a time.

The order of the layers, their statistics and their results are those of `Quantizer.quantize`; only where the weights
come from, and where the results go, is another matter. Each finished layer is a part (see partial.py), so that a run
that was killed knows what it has, and makes only the activations anew.
"""

from torch import Tensor, nn
from tqdm.auto import tqdm

from ..layers import Unsuitable
from .calibration import Runner
from .checkpoint import join
from .distributed import Ranks
from .errors import CalibrationError
from .float_files import FloatFiles
from .graft import graft, with_heads
from .paging import PagedModel, PagedRunner
from .partial import Partial, Row
from .plan import Plan, PlannedLayer
from .stages import Stages
from .units import failed, float_modules, graft_known, row_of


def check_data(run: Runner, ranks: Ranks) -> None:
    """CalibrationError where data comes in a way that block by block is no way for."""
    if run.function is not None:
        raise CalibrationError("from file to file, calibration data comes in batches: a function runs the whole model")
    if ranks.world > 1:
        raise CalibrationError(
            "calibration goes from block to block, which several processes cannot share: start one, without torchrun"
        )


class CalibratedParts:
    """Makes the parts of a calibrated model, one for each layer with codes of its own, and one for the experts of each
    fused module that stay in float.

    Raises what `PagedModel` and `Quantizer.quantize` raise; what was done before is kept.
    """

    def __init__(self, skeleton: nn.Module, plan: Plan, files: FloatFiles, partial: Partial, run: Runner, device):
        self.heads = with_heads(plan.todo)
        self.todo = self.heads.pop("")
        self.index = {planned.name: index for index, planned in enumerate(self.todo)}
        self.partial = partial
        self.sequential = plan.recipe.calibration.sequential
        self.paged = PagedModel(skeleton, plan, files, self._state, device)
        self.run = PagedRunner(run, self.paged)

    def make(self, details: bool, progress: bool) -> None:
        """Make those that are missing."""
        there = {name for name, index in self.index.items() if self.partial.has_part(index)}
        stages = Stages(lambda: self.paged.model, self.run, self.sequential, there.issuperset)
        with tqdm(total=len(self.todo), desc="quantize", disable=None if progress else True) as bar:
            for wave, stats in stages.of(self.todo):
                known = there.issuperset(planned.name for planned in wave)
                for planned in wave:
                    bar.set_postfix_str(planned.name, refresh=True)
                    self.paged.bring(planned.name)
                    if known:
                        self._put_back(planned)
                    else:
                        self._quantize(planned, stats, details)
                    stats.pop(planned.name, None)
                    bar.update()
        self._write_float_experts()

    def _put_back(self, planned: PlannedLayer) -> None:
        _, (row,) = self.partial.read_part(self.index[planned.name])
        if not row.left:
            state, heads = self._state(planned.name), self.heads.get(planned.name, [])
            state = {key: tensor.to(self.paged.device, copy=True) for key, tensor in state.items()}
            self.paged.model = graft_known(self.paged.model, planned, row, heads, state)

    def _quantize(self, planned: PlannedLayer, stats: dict, details: bool) -> None:
        try:
            heads = self.heads.get(planned.name, [])
            self.paged.model = graft(self.paged.model, planned, stats.get(planned.name), heads, details)
            row = row_of(planned, self.paged.model.get_submodule(planned.name))
        except Unsuitable as reason:
            row = Row(planned.name, left=str(reason))
        except Exception as error:
            raise failed(planned, error) from error
        in_fused = any(planned.name in unit.layers for unit in self.paged.fused.values())
        module = self.paged.model.get_submodule(planned.name)
        tensors = module.state_dict(prefix=join(planned.name, "")) if in_fused or not row.left else {}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        self.partial.write_part(self.index[planned.name], tensors, [row])

    def _state(self, name: str) -> dict[str, Tensor]:
        tensors, _ = self.partial.read_part(self.index[name])
        return {key.removeprefix(join(name, "")): tensor for key, tensor in tensors.items()}

    def _write_float_experts(self) -> None:
        for index, unit in enumerate(self.paged.fused.values(), len(self.todo)):
            if self.partial.has_part(index):
                continue
            tensors = self.paged.files.read(join(unit.home, leaf) for leaf in unit.leaves)
            left: dict[str, Tensor] = {}
            for name, linear in float_modules(self.paged.skeleton, unit, tensors):
                if name not in unit.layers:
                    left.update(linear.state_dict(prefix=join(name, "")))
            self.partial.write_part(index, left, [])
