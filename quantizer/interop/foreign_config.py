"""What is read of the `quantization_config` that others write, with its types: anything may stand in a file.

compressed-tensors: its QuantizationConfig, QuantizationScheme and QuantizationArgs, whose names and defaults these are.
Entries that are not named here are of no consequence for reading, and pass.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class Numbers(_Entry):
    """How weights or activations are rounded. group_size: in features; dynamic may say how.

    actorder: "group" or "dynamic", in older files True: weight_g_idx says which features a group has.
    """

    num_bits: int = 8
    type: str = "int"
    symmetric: bool = True
    strategy: str | None = None
    group_size: int | None = None
    dynamic: bool | str = False
    actorder: bool | str | None = None


class Group(_Entry):
    """Layers that are quantized alike. targets: names, expressions after "re:", classes."""

    targets: list[str] = Field(default_factory=list)
    weights: Numbers | None = None
    input_activations: Numbers | None = None
    output_activations: dict | None = None
    format: str | None = None


class Sparsity(_Entry):
    format: str = "dense"


class CompressedTensors(_Entry):
    """A group may be the targets alone, where its name is that of a preset."""

    config_groups: dict[str, list[str] | Group] = Field(default_factory=dict)
    ignore: list[str] | None = None
    format: str | None = None
    quantization_status: str = "compressed"
    kv_cache_scheme: dict | None = None
    transform_config: dict | None = None
    sparsity_config: Sparsity | None = None


class _Words(_Entry):
    """Codes in words of 32 bits; w_bit and q_group_size are AutoAWQ's names. group_size: -1 for one group a row."""

    bits: int | None = Field(None, validation_alias=AliasChoices("bits", "w_bit"))
    group_size: int | None = Field(128, validation_alias=AliasChoices("group_size", "q_group_size"))


class GPTQ(_Words):
    """dynamic: of GPTQModel, rules for layers by name."""

    checkpoint_format: str | None = None
    format: str | None = None
    dynamic: dict[str, Any] | None = None


class AWQ(_Words):
    version: str | None = None
    zero_point: bool = True


E = TypeVar("E", bound=_Entry)


def checked(kind: type[E], config: Mapping[str, Any]) -> E:
    """The entries of config, ValueError with one that has no such type, where it is and what it is."""
    try:
        return kind.model_validate(dict(config))
    except ValidationError as error:
        # A group may be two things, and is found wrong as both: the error further inside is about what it is.
        worst = max(error.errors(), key=lambda one: len(one["loc"]))
        where = ".".join(str(part) for part in worst["loc"] if part not in ("list[str]", "Group"))
        what = "" if worst["type"] == "missing" else f", not {worst['input']!r:.40}"
        raise ValueError(f"{where}: {worst['msg'].lower()}{what}") from None
