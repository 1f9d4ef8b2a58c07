"""`qgraft export`."""

import sys
import warnings
from pathlib import Path

from .cli_output import say
from .interop.export import export
from .interop.huggingface import ModelFolder, quiet


def run(folder: Path, out: Path, format: str) -> None:
    """Load a quantized folder, write it in another format, with its tokenizer's files."""
    source = ModelFolder(folder)
    with quiet(bars=sys.stderr.isatty()):
        say(f"loading {source}")
        model = source.load_quantized()
    with source.files_to_carry(model) as files, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        export(model, out, format=format, extra_files=files)
    for warning in told:
        say(f"warning: {warning.message}")
    say(f"saved {out}")
