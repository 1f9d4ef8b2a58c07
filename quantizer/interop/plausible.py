"""Whether a config can be that of the weights beside it, asked before a model is built as the config says.

A damaged or hostile config can ask for a billion layers, or a row of a terabyte; building that takes all memory, on the
meta device all time. Files that hold the model it describes are at least so large, and this is what is compared. It is
generous: what passes may still not fit, and is then refused by names and shapes.
"""

import struct
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..weight_files import read_kinds

WIDTHS = ("hidden_size", "intermediate_size", "vocab_size")
# No format has less than a bit for a weight; eight times that is left for rows that layers share.
WEIGHTS_PER_BYTE = 64


def check_size(config: Any, folder: Path, gguf: str | None) -> None:
    """Raise CheckpointError if config asks for a model that the weight files cannot hold.

    config: of transformers. folder: that holds the files; gguf: the name of the one file, if it is GGUF. Folders whose
    weights are in other files pass.
    """
    where = folder / gguf if gguf else folder
    files = [where] if gguf else sorted(folder.glob("model*.safetensors"))
    if not files or (any(folder.glob("*.bin")) and not gguf):
        return
    text = config.get_text_config()
    layers = _whole(text, "num_hidden_layers")
    tensors = sum(map(_tensors_in, files))
    if layers > tensors:
        raise CheckpointError(
            f"{where}: the config says num_hidden_layers {layers}, and the weight files hold {tensors} tensors in all"
        )
    size = sum(file.stat().st_size for file in files)
    widths = {name: _whole(text, name) for name in WIDTHS}
    most, other = sorted(widths, key=widths.__getitem__)[:0:-1]
    if widths[most] * widths[other] > size * WEIGHTS_PER_BYTE:
        raise CheckpointError(
            f"{where}: the config says {most} {widths[most]} and {other} {widths[other]}, and the weight files have "
            f"{size} bytes"
        )


def _whole(config: Any, name: str) -> int:
    value = getattr(config, name, None)
    return value if isinstance(value, int) else 0


def _tensors_in(file: Path) -> int:
    if file.suffix == ".gguf":
        with open(file, "rb") as stream:
            header = stream.read(16)  # GGUF: magic, version, the number of tensors as uint64
        return struct.unpack("<Q", header[8:])[0] if len(header) == 16 else 0
    return len(read_kinds([file]))
