"""Model folders of transformers: float in, quantized out and in again, and what a stock client makes of those."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import qgraft
from qgraft import Quantizer, QuantLinear, Recipe
from qgraft.quantizer import CheckpointError
from qgraft.quantizer.interop.huggingface import ModelFolder, load_float, load_quantized

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

SENTENCES = ["the cat sat on the mat", "a dog ran over the hill", "quantize the linear layers"]
LLAMA = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL = {**LLAMA, "vocab_size": 64, "max_position_embeddings": 64}


def tokenizer():
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.WordLevelTrainer(special_tokens=["[UNK]", "[PAD]"], show_progress=False)
    inner.train_from_iterator(SENTENCES, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]")


def llama(**config):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, **config}))


def bert(name="BertModel"):
    return getattr(transformers, name)(transformers.BertConfig(**SMALL))


def on_disk(model, folder, with_tokenizer=True):
    model.save_pretrained(folder)
    if with_tokenizer:
        tokenizer().save_pretrained(folder)
    return folder


def quantized(source, out, recipe="w8a16", **options):
    """Quantize a folder into another one, and return the model."""
    model, tok = load_float(source)
    model = Quantizer(model).quantize(recipe, progress=False)
    with ModelFolder(source).files_to_carry(model, tok) as files:
        qgraft.save(model, out, extra_files=files, **options)
    return model


@torch.no_grad()
def answer(model):
    ids = torch.arange(24).reshape(2, 12)
    output = model(input_ids=ids)
    return output.logits if "logits" in output else output.last_hidden_state


@pytest.mark.parametrize("recipe", ["w8a16", "w8a32", "w4a4_svd_fast"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_answers_as_before_bit_by_bit(tmp_path, recipe, tied):
    source = on_disk(llama(tie_word_embeddings=tied), tmp_path / "float")
    model = quantized(source, tmp_path / "out", recipe)
    loaded, tok = load_quantized(tmp_path / "out")
    assert torch.equal(answer(loaded), answer(model))
    assert tok(SENTENCES)["input_ids"] == tokenizer()(SENTENCES)["input_ids"]
    assert not loaded.training
    assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("entry", ["num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size"])
def test_a_config_that_asks_for_more_than_the_files_hold_builds_nothing(tmp_path, entry, quantize):
    folder = on_disk(llama(), tmp_path / "model", with_tokenizer=False)
    if quantize:
        quantized(folder, tmp_path / "out")
        folder = tmp_path / "out"
    assert ModelFolder(folder).skeleton().config.num_hidden_layers == 2
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {entry: 1 << 40}))
    with pytest.raises(CheckpointError, match=rf"the config says .*{entry} 1099511627776"):
        ModelFolder(folder).skeleton()


@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM", "BertForSequenceClassification"])
def test_the_class_is_the_one_that_was_saved(tmp_path, name):
    source = on_disk(bert(name), tmp_path / "float", with_tokenizer=False)
    model = quantized(source, tmp_path / "out")
    loaded, tok = load_quantized(tmp_path / "out")
    assert type(loaded).__name__ == name and tok is None
    assert torch.equal(answer(loaded), answer(model))


def test_a_tied_head_that_was_quantized_is_untied_for_good(tmp_path):
    source = on_disk(llama(tie_word_embeddings=True), tmp_path / "float")
    recipe = Recipe.from_dict({"rules": [{"match": "lm_head", "scheme": "w8a16", "untie": True}]})
    model = quantized(source, tmp_path / "out", recipe)
    loaded, _ = load_quantized(tmp_path / "out")
    assert isinstance(loaded.lm_head, QuantLinear) and not loaded.config.tie_word_embeddings
    assert torch.equal(answer(loaded), answer(model))


def test_the_float_type_is_that_of_the_files_unless_another_is_asked_for(tmp_path):
    source = on_disk(llama().bfloat16(), tmp_path / "float")
    assert load_float(source)[0].dtype == torch.bfloat16
    assert load_float(source, torch.float32)[0].dtype == torch.float32
    quantized(source, tmp_path / "out")
    loaded, _ = load_quantized(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32, "which is never rounded"


def test_a_loaded_model_takes_few_tokens_wherever_its_tensors_lie_in_the_file(tmp_path):
    """Kernels for few tokens crash on tensors that are not aligned, and in a file they are not."""
    source = on_disk(llama().bfloat16(), tmp_path / "float")
    model = quantized(source, tmp_path / "out")
    loaded, _ = load_quantized(tmp_path / "out")
    assert all(t.data_ptr() % 64 == 0 for t in (*loaded.parameters(), *loaded.buffers()))
    ids = torch.ones(1, 3, dtype=torch.long)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_loaded_model_generates_and_its_config_says_what_is_quantized(tmp_path):
    model = llama()
    model.generation_config.max_new_tokens = model.generation_config.min_new_tokens = 3  # a random model may stop early
    quantized(on_disk(model, tmp_path / "float"), tmp_path / "out")
    loaded, _ = load_quantized(tmp_path / "out")
    recorded = loaded.config.to_dict()["quantization_config"]
    assert recorded["quant_method"] == "qgraft" and "model.layers.1.mlp.up_proj" in recorded["layers"]
    assert loaded.generation_config.max_new_tokens == 3
    ids = torch.ones(1, 4, dtype=torch.long)
    assert loaded.generate(ids, eos_token_id=None).shape == (1, 7)  # random weights may want to stop


def test_a_loaded_model_can_be_saved_again_to_the_same_bits(tmp_path):
    quantized(on_disk(llama(), tmp_path / "float"), tmp_path / "out")
    qgraft.save(load_quantized(tmp_path / "out")[0], tmp_path / "again")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_the_skeleton_needs_neither_weights_nor_memory(tmp_path):
    source = on_disk(llama(tie_word_embeddings=True), tmp_path / "float")
    (source / "model.safetensors").unlink()
    model = ModelFolder(source).skeleton()
    assert all(p.is_meta for p in model.parameters()) and not any(b.is_meta for b in model.buffers())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    head = Quantizer(model).plan("w8a16").layers[-1]
    assert head.scheme is None and "tied" in head.reason


def test_weights_that_would_be_random_are_an_error(tmp_path):
    source = on_disk(llama(), tmp_path / "float")
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"would be random: model\.layers\.1\.mlp\.up_proj\.weight"):
        load_float(source)


@pytest.mark.parametrize("name", ["pipeline", "AutoModel", "LlamaConfig", "_torch_pytree", "os.system", "NoSuch"])
def test_only_a_model_class_of_transformers_is_built(tmp_path, name):
    quantized(on_disk(llama(), tmp_path / "float"), tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    (tmp_path / "out/config.json").write_text(json.dumps({**config, "architectures": [name]}))
    with pytest.raises(CheckpointError, match="is no model class of transformers"):
        load_quantized(tmp_path / "out")


def test_code_in_a_folder_is_never_executed(tmp_path):
    source = tmp_path / "float"
    source.mkdir()
    (source / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    config = {"model_type": "evil", "architectures": ["Evil"]}
    (source / "config.json").write_text(
        json.dumps({**config, "auto_map": {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.Evil"}})
    )
    with pytest.raises(CheckpointError, match="its config cannot be read"):
        load_float(source)
    assert not (tmp_path / "executed").exists()


def test_folders_that_hold_no_model_say_what_is_missing(tmp_path):
    with pytest.raises(CheckpointError, match=r"no such folder; .*downloads nothing"):
        load_float("meta-llama/no-such-model")
    with pytest.raises(CheckpointError, match=r"neither config\.json nor a \.gguf file"):
        load_float(tmp_path)
    (tmp_path / "a.gguf").touch()
    (tmp_path / "b.gguf").touch()
    with pytest.raises(CheckpointError, match=r"several \.gguf files; give the path of one: a\.gguf, b\.gguf"):
        load_float(tmp_path)
    source = on_disk(llama(), tmp_path / "float")
    with pytest.raises(CheckpointError, match="is no qgraft checkpoint"):
        load_quantized(source)
    quantized(source, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"is quantized already \(qgraft\)"):
        load_float(tmp_path / "out")


def test_without_transformers_the_error_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'qgraft\[hf\]'"):
        load_float(tmp_path)


STOCK_CLIENT = """
import sys
from transformers import AutoModel, AutoModelForCausalLM
for path in sys.argv[1:]:
    auto = AutoModel if "bert" in path else AutoModelForCausalLM
    try:
        auto.from_pretrained(path)
        print("loaded", path)
    except RuntimeError as error:
        print("refused")
        print(error, file=sys.stderr)  # 4.57 says it here, 5.x in a report before
assert "qgraft" not in sys.modules
"""


def test_a_client_that_does_not_know_qgraft_fails_and_never_gets_random_weights(tmp_path):
    """Without the guard it would: unknown kinds of quantization are ignored with a warning."""
    source = on_disk(llama(tie_word_embeddings=True), tmp_path / "float")
    quantized(source, tmp_path / "w8a16")
    quantized(source, tmp_path / "svd", "w4a4_svd_fast")
    quantized(source, tmp_path / "sharded", shard_bytes=50_000)
    one = {"rules": [{"match": "model.layers.1.mlp.down_proj", "scheme": "w8a16"}]}
    quantized(source, tmp_path / "one-layer", Recipe.from_dict(one))
    head = {"rules": [{"match": "lm_head", "scheme": "w8a16", "untie": True}]}
    quantized(source, tmp_path / "only-head", Recipe.from_dict(head))
    quantized(on_disk(bert(), tmp_path / "encoder"), tmp_path / "bert")
    folders = [tmp_path / name for name in ("w8a16", "svd", "sharded", "one-layer", "only-head", "bert")]
    command = [sys.executable, "-c", STOCK_CLIENT, *map(str, folders)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n") == ["refused"] * len(folders) + [""]
    assert "MISMATCH" in result.stderr or "size mismatch" in result.stderr


def write_gguf(file, model):
    """A Llama in GGUF, all in float32. Rows of q and k are in GGUF's order of rotary halves."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    words = ["a", "b", "ab", "ba", *(f"<{i}>" for i in range(4, config.vocab_size))]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_bos_token_id(config.vocab_size - 1)
    writer.add_eos_token_id(config.vocab_size - 2)
    writer.add_token_merges(["a b", "b a"])  # one alone is no list to transformers 4
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            halves = tensor.view(config.num_attention_heads, 2, -1, tensor.shape[1])
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_a_model_folder_too(tmp_path):
    float_model = llama().eval()
    folder = tmp_path / "gguf"
    folder.mkdir()
    write_gguf(folder / "tiny.gguf", float_model)
    model, tok = load_float(folder / "tiny.gguf")
    torch.testing.assert_close(answer(model), answer(float_model))
    assert isinstance(model.lm_head, nn.Linear), "unpacked, so that there is something to quantize"
    assert len(Quantizer(ModelFolder(folder).skeleton()).plan("w8a16").todo) == 15
    model = quantized(folder, tmp_path / "out")
    loaded, loaded_tok = load_quantized(tmp_path / "out")
    assert torch.equal(answer(loaded), answer(model))
    assert loaded_tok("abba")["input_ids"] == tok("abba")["input_ids"]
