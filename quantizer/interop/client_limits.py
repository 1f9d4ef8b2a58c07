"""What clients make of a compressed-tensors folder that is not what its user expects, known before it is written.

Of vLLM: its source and tests/test_vllm.py (0.33); of transformers: tests/test_compressed_tensors.py.
"""

from typing import Any

from torch import Tensor

from ..checkpoint import join
from ..errors import some
from . import compressed_tensors

# Layers that vLLM fuses into one, with one scheme and one scale of static activations.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# Groups that vLLM's fast kernels have.
VLLM_GROUPS = (None, 32, 64, 128)


def of(
    settings: dict[str, dict[str, Any]], tensors: dict[str, dict[str, Tensor]], linears: set[str], untied: bool
) -> list[str]:
    """A sentence for each, none if there is nothing to say.

    settings, tensors: by name of a layer, its entry of `config_groups` and its tensors. linears: the names of all
    linear layers, float ones too. untied: whether the head shared the codes of the embedding.
    """
    said = []
    fused = _fused(linears)
    mixed = [home for home, names in fused.items() if len({repr(settings.get(name)) for name in names}) > 1]
    if mixed:
        said.append(f"vLLM fuses these layers and needs them alike: {some(mixed)}")
    ranges = [home for home, names in fused.items() if home not in mixed and len({*_ranges(names, tensors)}) > 1]
    if ranges:
        said.append(
            "vLLM fuses these layers and keeps one static range of their input, the last that it reads, and theirs "
            f"differ: {some(ranges)}. Quantize with act_range: minmax, absmax or percentile, which are the input's own"
        )
    packed = {name: s["weights"] for name, s in settings.items() if s["format"] == compressed_tensors.PACKED}
    integers = {name: s["weights"] for name, s in settings.items() if name not in packed}
    lopsided = [n for n, w in packed.items() if not w["symmetric"]]
    if lopsided:
        said.append(
            "zero points: transformers 5 loads them only with CompressedTensorsConfig(dequantize=True), 4 does not"
            + ("" if all(packed[n]["num_bits"] == 4 for n in lopsided) else ", and vLLM has 8-bit weights without only")
        )
    if any(not w["symmetric"] for w in integers.values()):
        said.append("zero points of int8 weights with int8 activations: vLLM has none")
    sizes = sorted({w["group_size"] for w in packed.values()} - set(VLLM_GROUPS))
    if sizes:
        said.append(f"groups of {', '.join(map(str, sizes))}: vLLM's fast kernels have 32, 64 and 128")
    if untied:
        said.append(
            "the output head shared the codes of the embedding; it is written apart (tie_word_embeddings: false)"
        )
    return said


def _fused(linears: set[str]) -> dict[str, list[str]]:
    """The layers that are there of each fused one, by a name such as `layers.0.attn.{q_proj,k_proj,v_proj}`."""
    found = {}
    for leaves in FUSED:
        for home in sorted({name.rpartition(".")[0] for name in linears if name.rpartition(".")[2] in leaves}):
            names = [join(home, leaf) for leaf in leaves]
            found[join(home, "{" + ",".join(leaves) + "}")] = [name for name in names if name in linears]
    return found


def _ranges(names: list[str], tensors: dict[str, dict[str, Tensor]]) -> list[tuple[float, float]]:
    """Scale and zero point of the static activations of each of the layers, of those that have them."""
    return [
        tuple(t[leaf].item() if leaf in t else 0.0 for leaf in ("input_scale", "input_zero_point"))
        for t in (tensors.get(name, {}) for name in names)
    ]
