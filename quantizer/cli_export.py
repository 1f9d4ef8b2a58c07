"""`qgraft export`."""

import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from .cli_options import Debug, QuantizedDir
from .cli_output import say
from .interop import export as exporting
from .interop.huggingface import ModelFolder, quiet


def export(
    folder: QuantizedDir,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write, a new one.", show_default=False)],
    format: Annotated[str, typer.Option(metavar="F", help="Format of others.")] = "compressed-tensors",
    debug: Debug = False,
) -> None:
    """Write a quantized model in a format of others.

    compressed-tensors is what transformers and vLLM load, without qgraft. Recipes w4a16_ct, w8a8_ct and
    w8a16 make layers that it can hold.

    \b
    Example: qgraft export ./w4a16_ct --out ./for_vllm
    """
    source = ModelFolder(folder)
    with quiet(bars=sys.stderr.isatty()):
        say(f"loading {source}")
        model = source.load_quantized()
    with source.files_to_carry(model) as files, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        exporting.export(model, out, format=format, extra_files=files)
    for warning in told:
        say(f"warning: {warning.message}")
    say(f"saved {out}")
