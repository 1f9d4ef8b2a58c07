"""Model folders of the Hugging Face kind: float ones to quantize, and quantized ones that `save` wrote.

    model, tokenizer = load_float("SmolLM2-135M")
    Quantizer(model).quantize("w8a16")
    with ModelFolder("SmolLM2-135M").files_to_carry(model, tokenizer) as files:
        qgraft.save(model, "out", extra_files=files)
    model, tokenizer = load_quantized("out")

Needs the extra `hf`. Nothing is ever downloaded, and no code that lies in a folder is executed: the model
class is looked up by its name in transformers.
"""

import copy
import json
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..checkpoint import read_json
from ..errors import CheckpointError
from ..loading import load
from . import foreign, plausible

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

CONFIG, GENERATION = "config.json", "generation_config.json"
# Quantized by these, a folder can be loaded.
READABLE = ("qgraft", *foreign.METHODS)
# Where any of these is, there is a tokenizer.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
)
# What else belongs to a model and stays true of it once it is quantized.
COMPANIONS = (
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    GENERATION,
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
)


def load_float(folder: str | Path, dtype: torch.dtype | None = None) -> tuple["PreTrainedModel", Any | None]:
    """A float model and its tokenizer, None if it has none.

    folder: with config.json and weights, or with one .gguf file and no config.json; or a path to a .gguf
    file, whose weights are unpacked to floats.
    dtype: by default that of the files; float32 for GGUF.
    Raises CheckpointError, also where weights are missing that transformers would fill with random numbers.
    """
    source = ModelFolder(folder)
    return source.load(dtype), source.tokenizer()


def load_quantized(
    folder: str | Path, device: torch.device | str | None = None
) -> tuple["PreTrainedModel", Any | None]:
    """A quantized model that `qgraft.save` wrote from a transformers model, in eval mode, and its tokenizer.

    The float weights never exist: the model is built without memory for them. Raises CheckpointError.
    """
    source = ModelFolder(folder)
    return source.load_quantized(device), source.tokenizer()


class ModelFolder:
    """A folder (or a .gguf file) with a model; what is read from it is read when it is first asked for."""

    def __init__(self, path: str | Path):
        path = Path(path)
        self.path, self.gguf = path, None
        if path.suffix == ".gguf" and path.is_file():
            self.path, self.gguf = path.parent, path.name
        elif not path.is_dir():
            what = "is a file, not a folder" if path.exists() else "no such folder"
            raise CheckpointError(
                f"{path}: {what}; give a folder with a model, or a .gguf file (qgraft downloads nothing)"
            )
        elif not (path / CONFIG).is_file():
            found = sorted(file.name for file in path.glob("*.gguf"))
            if len(found) > 1:
                raise CheckpointError(f"{path}: holds several .gguf files; give the path of one: {', '.join(found)}")
            if not found:
                raise CheckpointError(f"{path}: holds neither {CONFIG} nor a .gguf file, so no model")
            self.gguf = found[0]
        _transformers()

    def __str__(self) -> str:
        return str(self.path / self.gguf if self.gguf else self.path)

    @property
    def quant_method(self) -> str:
        """Who quantized it, "qgraft" for one of ours; "" for a float model."""
        if self.gguf:
            return ""
        recorded = read_json(self.path / CONFIG).get("quantization_config")
        return str(recorded.get("quant_method", "unknown")) if isinstance(recorded, dict) else ""

    @cached_property
    def config(self) -> "PretrainedConfig":
        """The model's own config, without a word of quantization."""
        from transformers import AutoConfig

        with _in_words(self, "its config cannot be read"):
            config = AutoConfig.from_pretrained(self.path, **self._options)
        return _without_quantization(config)

    @property
    def model_class(self) -> type["PreTrainedModel"]:
        """The class that the config names. Only classes of models are taken, and only from transformers."""
        transformers = _transformers()
        names = self.config.architectures
        if not names and self.gguf:
            mapping = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
            if type(self.config) in mapping:
                return mapping[type(self.config)]
        if not names:
            raise CheckpointError(
                f'{self}: {CONFIG} names no class of model: add it, such as "architectures": ["LlamaForCausalLM"]'
            )
        name = str(names[0])
        found = None if name.startswith("_") else getattr(transformers, name, None)
        if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
            raise CheckpointError(
                f"{self}: {name!r} is no model class of transformers {transformers.__version__}; code from "
                "model folders is never executed. Build the model in Python: Quantizer and qgraft.load "
                "take any nn.Module"
            )
        return found

    def skeleton(self, dtype: torch.dtype | None = None) -> "PreTrainedModel":
        """The float model in eval mode with its weights on the meta device, where they take no memory.

        Where a model cannot be built so, it is built for real, with random weights. CheckpointError if it would be
        larger than the weight files can hold.
        """
        from accelerate import init_empty_weights

        cls, options = self.model_class, {"dtype": dtype} if dtype else {}
        plausible.check_size(self.config, self.path, self.gguf)
        config = copy.deepcopy(self.config)  # building writes the dtype into it
        try:
            # Buffers are made for real: no checkpoint holds those that a model computes when it is built.
            with init_empty_weights(include_buffers=False):
                model = cls._from_config(config, **options)
            model.tie_weights()  # moving to meta made two parameters of a tied one
            built = not any(buffer.is_meta for buffer in model.buffers())
        except Exception:
            built = False
        if not built:
            with _in_words(self, "the model cannot be built"):
                model = cls._from_config(config, **options)
        return model.eval()

    def check_float(self) -> None:
        """Raise CheckpointError for a model that somebody has quantized already."""
        method = self.quant_method
        if method:
            raise CheckpointError(
                f"{self}: is quantized already ({method}); give the float model that it was made from"
            )

    def load(self, dtype: torch.dtype | None = None) -> "PreTrainedModel":
        """The float model, in eval mode."""
        self.check_float()
        options = {**self._options, "dtype": dtype or "auto"}
        if self.gguf:
            options["dtype"] = dtype or torch.float32
            gguf_config = getattr(_transformers(), "GgufConfig", None)
            if gguf_config is not None:  # where it is known, weights may stay packed unless told otherwise
                options["quantization_config"] = gguf_config(dequantize=True)
        cls = self.model_class
        with _in_words(self, "transformers cannot load it"):
            model, info = cls.from_pretrained(self.path, config=self.config, output_loading_info=True, **options)
        missing = sorted(info["missing_keys"])
        if missing:
            raise CheckpointError(
                f"{self}: has no values for {len(missing)} weights of {cls.__name__}, which would be random: "
                f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}"
            )
        _without_quantization(model.config)  # GGUF's, which is unpacked by now
        return model

    def load_quantized(self, device: torch.device | str | None = None) -> "PreTrainedModel":
        """What `qgraft.save` wrote, or others in a format that qgraft reads, in eval mode."""
        if self.quant_method not in READABLE:
            raise CheckpointError(f"{self}: is no qgraft checkpoint; load_float() reads float models")
        model = load(self.path, model=self.skeleton, device=device)
        if (self.path / GENERATION).is_file() and model.can_generate():
            with _in_words(self, f"{GENERATION} cannot be read"):
                model.generation_config = _transformers().GenerationConfig.from_pretrained(
                    self.path, local_files_only=True
                )
        return model

    def tokenizer(self) -> Any | None:
        """None, with a warning where it has files, if there is none that transformers can load."""
        if not self.gguf and not any((self.path / name).is_file() for name in TOKENIZER_FILES):
            return None
        try:
            with _in_words(self, "its tokenizer cannot be loaded"):
                return _transformers().AutoTokenizer.from_pretrained(self.path, **self._options)
        except CheckpointError as error:
            warnings.warn(str(error), stacklevel=2)
            return None

    @contextmanager
    def files_to_carry(self, model: nn.Module, tokenizer: Any | None = None) -> Iterator[list[Path]]:
        """The files that belong beside the quantized model, for `save(..., extra_files=...)`.

        Those of the folder as they are; for GGUF, which has no such files, they are written, and gone after
        the block.
        """
        if not self.gguf:
            yield [f for n in (*TOKENIZER_FILES, *COMPANIONS) if (f := self.path / n).is_file()]
            return
        with tempfile.TemporaryDirectory() as folder:
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            generation = getattr(model, "generation_config", None)
            if generation is not None:
                text = json.dumps(generation.to_diff_dict(), indent=2)
                (Path(folder) / GENERATION).write_text(text + "\n", encoding="utf-8")
            yield sorted(file for file in Path(folder).iterdir() if file.is_file())

    @property
    def _options(self) -> dict[str, Any]:
        options = {"local_files_only": True, "trust_remote_code": False}
        return {**options, "gguf_file": self.gguf} if self.gguf else options


@contextmanager
def quiet(bars: bool) -> Iterator[None]:
    """Inside, transformers logs errors only, and shows progress only if `bars`."""
    logging = _transformers().utils.logging
    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def _transformers() -> Any:
    try:
        import accelerate  # noqa: F401 - builds models without memory, and transformers asks for it
        import transformers
    except ImportError as error:
        raise ImportError(
            f"model folders of the Hugging Face kind need the extra 'hf' ({error}): pip install 'qgraft[hf]'"
        ) from error
    return transformers


def _without_quantization(config: "PretrainedConfig") -> "PretrainedConfig":
    # transformers takes the mere attribute as an order to find a quantizer of that name.
    config.__dict__.pop("quantization_config", None)
    return config


@contextmanager
def _in_words(source: ModelFolder, what: str) -> Iterator[None]:
    """Whatever transformers raises is about this folder, and has too many classes for a caller to know."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(f"{source}: {what}: {type(error).__name__}: {error}") from error
