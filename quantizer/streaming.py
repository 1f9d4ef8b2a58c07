"""Quantize a model that is larger than memory: from safetensors to safetensors, a few layers at a time.

    unit      what has to be read at once, mostly one layer; with calibration data a block of the model
    part      a quantized unit, in a file of its own until all are there
    shard     a file of the result, put together from parts and from what stays in float

The model itself stays on meta. Memory is that of the largest unit while it is quantized, then of one shard, most of
which is mapped from files and can be let go. The weight files are those that `Quantizer` and `save` would write, byte
by byte.
"""

import copy
import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..recipes import Recipe, load_recipe
from .calibrated_files import CalibratedParts, check_data
from .calibration import Runner, make_runner
from .checkpoint import (
    GUARD,
    SHARD_BYTES,
    check_target,
    finish,
    join,
    nbytes,
    plan_shards,
    quantized_layers,
    write_index,
)
from .distributed import Ranks
from .errors import CalibrationError, PlanError, QuantizeError, some
from .float_files import FloatFiles, Naming, same_names
from .partial import Partial
from .plan import Plan, make_plan
from .report import Report
from .units import graft_empty, make_units, quantize_unit


def quantize_files(
    folder: str | Path,
    recipe: str | Path | Recipe,
    out: str | Path,
    *,
    model: nn.Module,
    calibration: Any = None,
    tokenizer: Any = None,
    naming: Naming = same_names,
    device: torch.device | str | None = None,
    shard_bytes: int = SHARD_BYTES,
    extra_files: Iterable[str | Path] = (),
    details: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = lambda message: None,
) -> Report:
    """Quantize a folder of safetensors into a checkpoint, without ever building the model.

    folder: with model.safetensors, or several files and model.safetensors.index.json.
    recipe: as for `Quantizer`.
    calibration, tokenizer: as for `Quantizer.quantize`, but no function; without, the recipe must do without data.
    The model must then have its blocks in an `nn.ModuleList` or `nn.Sequential`; what is outside of them stays in
    memory.
    out: the folder to write, as for `save`; shard_bytes, extra_files: likewise.
    model: the float model on the meta device; its dtypes are what the weights are read as. It is not changed.
    naming: how tensors are called in the files, if not as in the model.
    device: where to quantize; the CPU if none is given. details: as for `Quantizer.quantize`.
    say: is told in a sentence what goes on.

    Killed, it leaves `.<name>.partial` beside `out`, and the same call goes on from there to the same bytes.
    Started by torchrun, the processes share the layers, unless there is calibration data; each returns the report.
    Raises RecipeError, PlanError, CalibrationError, CannotStream and CheckpointError before the first layer, and
    QuantizeError for a layer that fails, such as one with NaN; what was done by then is kept.
    """
    path, ranks = Path(out).resolve(), Ranks()
    # The lock is let go of last, when all processes have stopped: after an error that may clear the folder.
    with ExitStack() as lock, ranks.together():
        plan = make_plan(model, load_recipe(recipe))
        run = None
        if calibration is not None:
            run = make_runner(calibration, plan.recipe.calibration, tokenizer, progress)
            check_data(run, ranks)
        _check(plan, run)
        check_target(path)
        files, partial = FloatFiles(Path(folder), model, naming), Partial(path)
        device = ranks.device(device)
        job = {**_job(plan, files, device, shard_bytes), "calibration": run and run.digest(), "details": details}
        if ranks.is_first:
            lock.enter_context(partial.alone())
        if run is None:
            _quantize(model, plan, files, partial, ranks, device, job, progress, say)
        else:
            _calibrate(model, plan, files, partial, run, device, job, progress, say)
        rows = partial.rows()
        left = [f"'{row.name}': {row.left}" for row in rows.values() if row.left]
        if left and ranks.is_first:
            warnings.warn("these layers stay as they are:\n" + some(left, "\n"), stacklevel=2)
        result = graft_empty(copy.deepcopy(model), plan, rows)
        _write(result, files, partial, ranks, shard_bytes, extra_files)
    if ranks.is_first:
        partial.done()
    return Report.of(result)


def _check(plan: Plan, run: Runner | None) -> None:
    if not plan.todo:
        raise PlanError(f"recipe {plan.recipe.name} quantizes no layer of this model")
    for planned in plan.todo if run is None else ():
        if complaint := planned.scheme.needs_data():
            raise CalibrationError(f"layer '{planned.label}': {complaint}")


def _job(plan: Plan, files: FloatFiles, device: torch.device | None, shard_bytes: int) -> dict[str, Any]:
    """All that the bytes of the result depend on."""
    from .. import __version__

    return {
        "recipe": plan.recipe.to_dict(),
        "layers": [[x.name, x.scheme_name, x.scheme.model_dump()] for x in plan.todo],
        "model": {name: [list(t.shape), str(t.dtype)] for name, t in files.state.items()},
        "files": files.fingerprint(),
        "shard_bytes": shard_bytes,
        "device": "cpu" if device is None else device.type,
        "torch": torch.__version__,
        "qgraft": __version__,
    }


def _quantize(
    model: nn.Module,
    plan: Plan,
    files: FloatFiles,
    partial: Partial,
    ranks: Ranks,
    device: torch.device | None,
    job: dict[str, Any],
    progress: bool,
    say: Callable[[str], None],
) -> None:
    """Make the parts that are missing, each in one of the processes."""
    units, todo = make_units(model, plan), []
    if ranks.is_first:
        partial.begin(job)
        todo = [i for i in range(len(units)) if not partial.has_part(i)]
        if len(todo) < len(units):
            say(f"going on from an interrupted run: {len(units) - len(todo)} of {len(units)} parts are there")
        if ranks.world > 1:
            say(f"{ranks.world} processes share {len(todo)} parts")
            todo.sort(key=lambda i: -units[i].cost)
    todo = ranks.agree("parts", todo)
    if not partial.job.exists():
        ranks.stop_if_one_failed()  # rank 0, say, which then cleared the folder away
        raise QuantizeError(f"{partial.root} of rank 0 cannot be seen here: write to a folder that all machines see")
    with tqdm(total=len(todo), desc="quantize", disable=None if progress and ranks.is_first else True) as bar:
        for index in ranks.share("next part", todo):
            bar.set_postfix_str(units[index].home, refresh=True)
            partial.write_part(index, *quantize_unit(model, files, units[index], device, job["details"]))
            bar.update()
    ranks.meet("all parts are there")


def _calibrate(
    model: nn.Module,
    plan: Plan,
    files: FloatFiles,
    partial: Partial,
    run: Runner,
    device: torch.device | None,
    job: dict[str, Any],
    progress: bool,
    say: Callable[[str], None],
) -> None:
    """Make the parts that are missing, block by block."""
    parts = CalibratedParts(model, plan, files, partial, run, device)
    partial.begin(job)
    if there := sum(map(partial.has_part, parts.index.values())):
        say(f"going on from an interrupted run: {there} of {len(parts.index)} parts are there")
    parts.make(job["details"], progress)


def _write(
    result: nn.Module,
    files: FloatFiles,
    partial: Partial,
    ranks: Ranks,
    shard_bytes: int,
    extra_files: Iterable[str | Path],
) -> None:
    """Write the files of the result, each in one of the processes; the last step is that of the first."""
    sizes, tied, home = _state(result, partial)
    guards = dict.fromkeys((join(name, GUARD) for name in quantized_layers(result)), 0)
    shards = plan_shards(sizes | guards, shard_bytes)
    missing = [file for file in shards if not (partial.checkpoint / file).exists()] if ranks.is_first else []
    missing = ranks.agree("shards", missing)
    for file in ranks.share("next shard", missing):
        tensors = {name: torch.empty(0, dtype=torch.int8) for name in shards[file] if name in guards}
        parts = partial.read(home[name] for name in shards[file] if name in home)
        tensors.update({name: parts[home[name]] for name in shards[file] if name in home})
        floats = files.read(name for name in shards[file] if name not in tensors)
        partial.write_shard(file, tensors | {name: tensor.contiguous() for name, tensor in floats.items()})
    ranks.meet("all shards are there")
    if ranks.is_first:
        partial.clear_checkpoint(shards)
        write_index(partial.checkpoint, shards, sum(sizes.values()))
        finish(partial.checkpoint, partial.path, result, tied, extra_files)
    ranks.leave()


def _state(result: nn.Module, partial: Partial) -> tuple[dict[str, int], dict[str, str], dict[str, str]]:
    """Bytes of each tensor to save, in order; which names share one; and under which name each is in the parts."""
    state = result.state_dict(keep_vars=True)
    in_parts = {id(tensor): name for name, tensor in state.items() if name in partial.sizes}
    sizes: dict[str, int] = {}
    tied: dict[str, str] = {}
    home: dict[str, str] = {}
    seen: dict[int, str] = {}
    for name, tensor in state.items():
        if tensor.numel() and id(tensor) in seen:
            tied[name] = seen[id(tensor)]
            continue
        seen[id(tensor)] = name
        if id(tensor) in in_parts:
            home[name] = in_parts[id(tensor)]
            sizes[name] = partial.sizes[home[name]]
        else:
            sizes[name] = nbytes(tensor)
    return sizes, tied, home
