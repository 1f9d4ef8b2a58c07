"""`qgraft warmup`: compile the kernels that a model needs before its first user waits for them."""

import sys
from typing import Annotated

import torch
import typer
from tqdm import tqdm

from ..layers import EMBEDDINGS, QuantLinear
from .checkpoint import read_config
from .cli_options import Debug, Device, QuantizedDir
from .cli_output import UsageError, say
from .loading import build_layer


def warmup(
    folder: QuantizedDir,
    tokens: Annotated[
        str, typer.Option(metavar="M,..", help="Numbers of tokens that a layer will see at once.")
    ] = "1,16,64,512,2048",
    tune: Annotated[bool, typer.Option("--tune", help="Try other tiles too, and keep what is faster.")] = False,
    device: Device = None,
    debug: Debug = False,
) -> None:
    """Compile the GPU kernels that a quantized model needs.

    Runs one layer of each kind, empty: nobody has to wait for a compiler later. Reads no weights.

    \b
    Example: qgraft warmup ./w4a16 --tokens 1,512 --tune
    """
    counts = tuple(int(count) if count.strip().isdecimal() else 0 for count in tokens.split(","))
    if min(counts) < 1:
        raise UsageError(f"{tokens}: give numbers such as 1,512", param_hint="'--tokens'")
    entries = read_config(folder)["layers"]
    kinds: dict[str, str] = {}  # what a kernel is compiled for -> a layer of that kind
    for name, entry in entries.items():
        if str(entry.get("scheme")) in EMBEDDINGS:
            continue  # a look-up, for which nothing is compiled
        kinds.setdefault(repr(sorted(entry.items(), key=lambda item: item[0])), name)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if tune and device.type != "cuda":
        raise UsageError("tiles are tuned on a CUDA or ROCm device, and there is none here", param_hint="'--tune'")
    if device.type != "cuda":
        say(
            "no CUDA or ROCm device, so no GPU kernel is compiled: Triton does that on the machine where the model "
            "will run. Each kind of layer runs once on the CPU instead, which compiles what is compiled there."
        )
    rows = []
    with tqdm(total=len(kinds) * len(counts), desc="warmup", unit="run", disable=not sys.stderr.isatty()) as bar:
        for name in kinds.values():
            layer = _empty(build_layer(folder, name, entries[name]), device)
            for m in counts:
                bar.set_postfix_str(f"{layer.out_features} x {layer.in_features}, {m} tokens")
                rows += _warm(layer, m, tune, device)
                bar.update()
    say(f"ran {len(kinds)} kinds of layers ({len(entries)} in all) with {', '.join(map(str, counts))} tokens")
    if tune:
        _keep(rows, device)


def _empty(layer: QuantLinear, device: torch.device) -> QuantLinear:
    layer = layer.to_empty(device=device)
    for tensor in layer.state_dict().values():
        tensor.zero_()
    return layer.eval()


@torch.inference_mode()
def _warm(layer: QuantLinear, m: int, tune: bool, device: torch.device) -> list[dict]:
    x = torch.randn(m, layer.in_features, device=device, dtype=layer.dtype)
    layer(x)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if not tune:
        return []
    from ..kernels.gpu import tuning

    return tuning.tune(lambda: layer(x))


def _keep(rows: list[dict], device: torch.device) -> None:
    from ..kernels.gpu import configs, tuning

    name = torch.cuda.get_device_name(device)
    if rows:
        tuning.keep(name, rows)
        gain = max(row["seconds_before"] / row["seconds"] for row in rows)
        say(f"{len(rows)} tiles are faster than before (by up to {gain:.2f}x) and kept in {configs.cache_file(name)}")
    else:
        say("no tile is faster than those in use")
