"""A folder of ours through transformers' `from_pretrained`: all is checked on meta first, then its loader fills it."""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from ..checkpoint import CONFIG, GUARD, INDEX, read_json
from ..errors import CheckpointError, some
from ..loading import NAMED_FLOATS, fit, put, read_reports, tie_codes
from ..weight_files import aligned, weight_files


class Loading:
    """From the skeleton on meta, whose layers are replaced by empty ones, to the model.

    model: on meta, as transformers built it. recorded: the quantization_config. files: what transformers is going
    to read; None where it does not say so (4.57). dtype: of the model's floats.
    Raises CheckpointError, before any weight is read, where files, config and model do not fit to the last tensor.
    """

    def __init__(self, model: nn.Module, recorded: dict[str, Any], files: list[Path] | None, dtype: torch.dtype):
        folder = _parent(files) if files else _folder(model)
        self.folder, self.files, self.tied = folder, weight_files(folder, recorded["files"]), recorded["tied"]
        if files is not None and set(files) != set(self.files):
            names = some([str(file) for file in files])
            raise CheckpointError(f"{folder}: transformers would read {names}, which is not what {CONFIG} records")
        config = read_json(folder / CONFIG)
        _check_class(folder, config, model)
        model, sites, self.layers = fit(folder, model, recorded, self.files)
        saved = NAMED_FLOATS.get(str(config.get("dtype", config.get("torch_dtype"))).removeprefix("torch."))
        if dtype != saved:
            self.layers = {name: layer.to(dtype) for name, layer in self.layers.items()}
        put(model, sites, self.layers, read_reports(folder))
        self.own = {
            f"{name}.{leaf}": buffer
            for name, layer in self.layers.items()
            for leaf, buffer in layer._buffers.items()
            if buffer is not None
        }
        # Floats that the model itself makes in another type, as Mamba does A_log.
        others = (*model.named_parameters(), *model.named_buffers())
        self.typed = {name for name, t in others if t.is_floating_point() and t.dtype != dtype} - self.own.keys()
        self.shared = [_home(model, name) for name in self.tied]
        for module, leaf in self.shared:  # is in no file, so the loader must not miss it
            if leaf in module._buffers:
                module._non_persistent_buffers_set.add(leaf)
        self.streams: dict[str, Any] = {}
        self.is_v5 = hasattr(model, "all_tied_weights_keys")
        self._expect(model, recorded["experts"])

    def _expect(self, model: nn.Module, experts: dict[str, str]) -> None:
        """The guards are in the files and not in the model, tied names the other way round: nothing to report."""
        guards = [f"{name}.{GUARD}" for name in self.layers]
        # 5.x takes the guard of an expert for one of the matrices that it would fuse.
        guards += [f"{name}.{leaf}" for name in experts for leaf in ("gate_up_proj", "up_proj", "down_proj")]
        names = {"_keys_to_ignore_on_load_unexpected": guards, "_keys_to_ignore_on_load_missing": list(self.tied)}
        self.ignored = {attribute: getattr(model, attribute) for attribute in names}
        for attribute, known in self.ignored.items():
            patterns = [f"^{re.escape(name)}$" for name in names[attribute]]
            setattr(model, attribute, (set if self.is_v5 else list)([*(known or ()), *patterns]))

    def keeps_type(self, name: str) -> bool:
        """4.57 casts floats that it loads to the type of the model; some have types of their own, scales above all."""
        return name in self.typed or (name in self.own and self.own[name].is_floating_point())

    def take(self, model: nn.Module, name: str, device: Any) -> None:
        """Put one of these in its place, as the files have it; what is not of our layers in the model's type for it."""
        if not self.streams:
            for file in self.files:
                stream = safe_open(file, framework="pt", device="cpu")
                self.streams.update(dict.fromkeys(stream.keys(), stream))
        module, leaf = _home(model, name)
        tensor = self.streams[name].get_tensor(name).to(device)
        if leaf in module._parameters:
            parameter = module._parameters[leaf]
            module._parameters[leaf] = nn.Parameter(tensor.to(parameter.dtype), requires_grad=parameter.requires_grad)
        else:
            module._buffers[leaf] = tensor if name in self.own else tensor.to(module._buffers[leaf].dtype)

    def check_missing(self, missing: list[str]) -> list[str]:
        """What is missing beyond what is tied; CheckpointError if that is anything."""
        left = [name for name in missing if name not in self.tied]
        if left:
            raise CheckpointError(f"{self.folder}: has no values for {some(left)}, which would be random")
        return left

    def finish(self, model: nn.Module) -> None:
        """Tie what shares codes or weights; raises CheckpointError if the loader passed one of our tensors by."""
        self.streams.clear()
        for attribute, known in self.ignored.items():
            setattr(model, attribute, known)
        for module, leaf in self.shared:
            module._non_persistent_buffers_set.discard(leaf)
        left = [name for name in self.own.keys() - self.tied.keys() if not self._has_come(model, name)]
        if left:
            raise CheckpointError(f"{self.folder}: transformers did not load {some(sorted(left))}")
        for name, wanted in self.own.items():  # 5.x makes float32 of all in a module that its class keeps so
            module, leaf = _home(model, name)
            module._buffers[leaf] = module._buffers[leaf].to(wanted.dtype)
        for name, source in self.tied.items():
            (module, leaf), (owner, kept) = _home(model, name), _home(model, source)
            for own, others in ((module._parameters, owner._parameters), (module._buffers, owner._buffers)):
                if leaf in own and kept in others:
                    own[leaf] = others[kept]
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.device.type == "cpu":
                tensor.data = aligned(tensor.data)
        tie_codes(self.layers.values())

    def _has_come(self, model: nn.Module, name: str) -> bool:
        module, leaf = _home(model, name)
        buffer = module._buffers[leaf]
        # 5.x marks what it loads; where accelerate spread the model, it made tensors of its own.
        unmarked = self.is_v5 and not hasattr(module, "_hf_hook") and not getattr(buffer, "_is_hf_initialized", False)
        return not buffer.is_meta and not unmarked


def _home(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _parent(files: list[Path]) -> Path:
    parents = {file.parent for file in files}
    if len(parents) > 1 or any(".." in file.name for file in files):
        raise CheckpointError(f"{INDEX} names files outside of the folder, refused: {some([str(f) for f in files])}")
    return parents.pop()


def _folder(model: nn.Module) -> Path:
    """Where 4.57 loads from: a local folder, or the snapshot of a repository that it has just fetched."""
    from transformers.utils import cached_file

    name, revision = model.config.name_or_path, getattr(model.config, "_commit_hash", None)
    options = {"local_files_only": True, "_raise_exceptions_for_missing_entries": False}
    file = cached_file(name, CONFIG, revision=revision, **options)
    if file is None:
        raise CheckpointError(f"{name}: has no {CONFIG}; give the path of the very folder if it is a subfolder")
    return Path(file).parent


def _check_class(folder: Path, config: dict[str, Any], model: nn.Module) -> None:
    names = config.get("architectures") or [type(model).__name__]
    if type(model).__name__ not in names:
        raise CheckpointError(
            f"{folder}: was saved from a {names[0]}, whose names its layers have, and cannot be loaded into a "
            f"{type(model).__name__}: load the {names[0]} and take the part that you want"
        )
