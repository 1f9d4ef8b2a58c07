"""Arguments and options that several commands share, as typer's annotated types."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer

from .cli_output import UsageError, set_debug


class Dtype(str, Enum):
    """Types that a float model can be loaded in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"

    @property
    def torch(self) -> torch.dtype | None:
        return None if self is Dtype.auto else getattr(torch, self.value)


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"{text}: {reason}") from None
    return device


def _debug(wanted: bool) -> bool:
    if wanted:
        set_debug(True)
    return wanted


ModelDir = Annotated[
    Path,
    typer.Argument(metavar="MODEL_DIR", help="Folder of a Hugging Face model, or a .gguf file.", show_default=False),
]
QuantizedDir = Annotated[Path, typer.Argument(metavar="DIR", help="A quantized model.", show_default=False)]
RecipeName = Annotated[
    str,
    typer.Option("--recipe", "-r", metavar="R", help="Shipped recipe (see `qgraft recipes`) or a YAML file."),
]
Every = Annotated[bool, typer.Option("--every", help="One line a layer, even where they are alike.")]
Json = Annotated[bool, typer.Option("--json", help="As JSON.")]
Device = Annotated[
    torch.device | None, typer.Option(metavar="DEVICE", parser=_device, help="Where to compute, such as cuda.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", callback=_debug)]
