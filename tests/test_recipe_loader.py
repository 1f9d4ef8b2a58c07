"""Where recipes are found: by name, by path, and the recipes that ship."""

import os
from pathlib import Path

import pytest

from qgraft.layers import SCHEMES
from qgraft.recipes import Recipe, RecipeError, SchemeSpec, load_recipe, pattern_matches, shipped_recipes

W4A4 = {name: option.default for name, option in SCHEMES["w4a4_svd"].Scheme.model_fields.items()}


@pytest.fixture
def write(tmp_path):
    def write(name: str, text: str | bytes) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def fails(source, message: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(source)
    assert message in str(caught.value)
    return str(caught.value)


def test_a_recipe_is_returned_as_it_is():
    recipe = Recipe(scheme="w8a16")
    assert load_recipe(recipe) is recipe


def test_a_path_may_be_text_or_path_and_gives_the_name(write, monkeypatch):
    path = write("mine.yml", "scheme: w8a16")
    assert load_recipe(path) == load_recipe(Path(path)) == Recipe(name="mine", scheme="w8a16")
    monkeypatch.chdir(Path(path).parent)
    assert load_recipe("mine.yml").where("scheme") == "mine.yml:1"
    assert load_recipe("./mine.yml").name == "mine"
    write("noending", "scheme: w8a16")
    assert load_recipe("noending").name == "noending"


def test_a_shipped_name_wins_over_a_folder_of_that_name(tmp_path, monkeypatch):
    (tmp_path / "w8a16").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_recipe("w8a16").scheme.name == "w8a16"


def test_an_unknown_name_gives_the_nearest_and_the_way_to_a_file():
    assert fails("w8a61", "'w8a16'").endswith("Or give a path to a .yaml file")
    assert "'w4a4_svd'" in fails("w4a4svd", "did you mean")
    for name in shipped_recipes():
        assert name in fails("zzzzzzzz", "there are")


@pytest.mark.parametrize("source", [None, 3, {"scheme": "w8a16"}])
def test_a_source_of_another_type_is_a_type_error(source):
    with pytest.raises(TypeError, match=r"Recipe\.from_dict"):
        load_recipe(source)


@pytest.mark.parametrize("source", ["", "a\0b", "a\0.yaml", "\ud800.yaml", "x" * 5000, "x" * 5000 + ".yaml"])
def test_strange_names_are_recipe_errors(source):
    fails(source, "")


def test_files_that_cannot_be_read_are_errors_with_the_path(write, tmp_path, monkeypatch):
    fails(tmp_path, f"{tmp_path}: is a folder")
    fails(str(tmp_path / "gone.yaml"), f"{tmp_path / 'gone.yaml'}: no such file")
    fails(str(tmp_path / "w8a16.yaml"), "no such file; did you mean the shipped recipe 'w8a16'?")
    fails(write("latin.yaml", "a: 1\nb: ü".encode("latin-1")), "latin.yaml:2: not UTF-8 text")
    fails(write("utf16.yaml", "scheme: a".encode("utf-16")), "utf16.yaml:1: not UTF-8 text")
    fails(write("big.yaml", "#" * (1 << 20) + "\n"), "big.yaml: larger than 1024 KiB")
    fails(write("empty.yaml", ""), "empty.yaml: empty")

    def forbidden(*args):
        raise PermissionError(13, "Permission denied")

    path = write("secret.yaml", "scheme: a")
    monkeypatch.setattr("qgraft.recipes.files.open", forbidden, raising=False)
    fails(path, "secret.yaml: cannot be read: Permission denied")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_refused_and_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    fails(tmp_path / "pipe.yaml", "is not a regular file")


# --- the recipes that ship


def test_the_shipped_recipes_are_found_by_name_and_describe_themselves():
    names = list(shipped_recipes())
    assert names == sorted(names) and {"bitnet", "factorized", "w4a4_svd", "w4a16", "w8a16", "w8a8"} <= set(names)
    for name, path in shipped_recipes().items():
        recipe = load_recipe(name)
        assert recipe == load_recipe(path)
        assert recipe.name == name and recipe.description and "\n" not in recipe.description
        assert Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_the_w8_recipes_quantize_everything():
    assert load_recipe("w8a32").scheme == SchemeSpec(name="w8a32")
    assert load_recipe("w8a16").scheme == SchemeSpec(name="w8a16", options={"dtype": "auto"})
    assert load_recipe("w8a32").rules == load_recipe("w8a16").rules == ()


def test_the_w4a4_recipe_names_every_option_and_the_fast_one_is_the_same_without_data():
    slow, fast = load_recipe("w4a4_svd"), load_recipe("w4a4_svd_fast")
    assert slow.scheme == SchemeSpec(name="w4a4_svd", options=W4A4)
    assert fast.scheme == SchemeSpec(name="w4a4_svd", options={**W4A4, "smooth": "weights", "rounding": "rtn"})
    assert fast.rules == slow.rules
    assert all(rule.optional and rule.skip for rule in slow.rules)


def skipped(name: str) -> bool:
    rules = load_recipe("w4a4_svd").rules
    return any(pattern_matches(pattern, name, "Linear") for rule in rules for pattern in rule.match)


@pytest.mark.parametrize(
    "name",
    [
        "lm_head",
        "model.lm_head",
        "lm_head.dense",
        "embed_out",
        "transformer.output_layer",
        "cls.predictions.decoder",
        "model.layers.3.mlp.gate",
        "model.layers.3.mlp.shared_expert_gate",
        "model.layers.0.block_sparse_moe.gate",
        "encoder.block.1.layer.1.mlp.router.classifier",
        "classifier",
        "score",
        "bert.pooler.dense",
        "transformer_blocks.0.norm1.linear",
        "transformer_blocks.0.norm1_context.linear",
        "single_transformer_blocks.0.norm.linear",
        "transformer_blocks.0.img_mod.1",
        "norm_out.linear",
        "adaln_single.linear",
        "time_text_embed.timestep_embedder.linear_1",
        "time_embedding.linear_2",
        "x_embedder",
        "context_embedder",
        "proj_out",
        "proj_out_2",
        "proj_in",
        "patch_embed.text_proj",
        "add_embedding.linear_1",
        "double_stream_modulation_img.linear",
        "distilled_guidance_layer.in_proj",
        "transformer_blocks.0.norm2.linear_1",
        "layers.3.adaln_modulation",
        "all_final_layer.2-1.linear",
        "transformer_blocks.0.img_mlp.gate",
    ],
)
def test_the_w4a4_recipe_leaves_delicate_layers_alone(name):
    assert skipped(name)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.3.self_attn.q_proj",
        "model.layers.3.mlp.gate_proj",
        "model.layers.3.mlp.experts.7.up_proj",
        "model.layers.3.mlp.shared_expert.gate_proj",
        "encoder.layer.0.attention.output.dense",
        "transformer.h.0.mlp.c_fc",
        "single_transformer_blocks.0.proj_out",
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.0.ff.net.0.proj",
        "transformer_blocks.0.img_mlp.net.2",
        "down_blocks.1.attentions.0.proj_in",
        "0",
    ],
)
def test_the_w4a4_recipe_quantizes_the_bulk_of_a_model(name):
    assert not skipped(name)
