"""The HTML report without a browser: its data, its structure, what it refuses; the same figures as files."""

import copy
import json
import random
import re
import shutil
import sys
from fractions import Fraction
from html.parser import HTMLParser

import pytest
import torch
import yaml
from report_models import HOSTILE, Small, made_up, quantized, saved
from safetensors.torch import load_file
from torch import nn

from qgraft import Quantizer, Recipe, Report, save
from qgraft.quantizer import CheckpointError, cli
from qgraft.quantizer.cli_report import Kind
from qgraft.quantizer.html import data, drawing, figures, page
from qgraft.quantizer.html.advice import notes_on_rest
from qgraft.quantizer.html.against import fill_details

pytest.importorskip("vl_convert")
SVD = {"name": "w4a4_svd", "rank": 8}
MAGIC = {".svg": b"<svg", ".png": b"\x89PNG", ".pdf": b"%PDF"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("reports")
    return [saved(base / "four", SVD), saved(base / "eight", "w8a16", details=False)]


@pytest.fixture(scope="module")
def shown(folders):
    return [data.read(folder) for folder in folders]


class Page(HTMLParser):
    """Tags with their attributes, the text of scripts, and the cells of each row of the table of layers."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.scripts, self.rows, self.inside, self.table = [], [], [], None, None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "script":
            self.scripts.append("")
        elif tag == "table":
            self.table = dict(attributes).get("id")
        elif tag == "tr" and self.table == "table":
            self.rows.append([])
        elif tag in ("td", "th") and self.table == "table":
            self.rows[-1].append("")
        self.inside = tag if tag in ("script", "style") else "cell" if tag in ("td", "th", "button") else self.inside

    def handle_endtag(self, tag):
        self.inside = None if tag in ("script", "style", "td", "th") else self.inside

    def handle_data(self, text):
        if self.inside == "script":
            self.scripts[-1] += text
        elif self.inside == "cell" and self.table == "table" and self.rows and self.rows[-1]:
            self.rows[-1][-1] += text.strip()

    @property
    def data(self):
        return json.loads(self.scripts[0], parse_constant=pytest.fail)


# -- what is read ------------------------------------------------------------------------------------------------------


def test_the_whole_model_is_counted_before_and_after(folders, shown):
    for folder, found in zip(folders, shown, strict=True):
        assert found.after == sum(t.nbytes for t in load_file(folder / "model.safetensors").values())
        assert found.before == sum(p.nbytes for p in Small().parameters())
        assert found.float_bytes == 4 * (50 * 48 + 40 * 48 + 40)
        assert [r["options"].get("rank") for r in found.rows] == [8 if found.name == "four" else None] * 6


def test_the_tree_has_every_byte_once_and_one_root(shown):
    nodes = data.tree(shown[0].modules)
    by_id = {node["id"]: node for node in nodes}
    assert len(by_id) == len(nodes) and [n["id"] for n in nodes if n["parent"] is None] == [data.ROOT]
    assert all(node["parent"] in by_id for node in nodes if node["parent"] is not None)
    assert sum(node.get("after", 0) for node in nodes) == shown[0].after
    assert {n["parent"] for n in nodes if n["label"] == "up"} == {f"blocks.{i}" for i in range(3)}
    totals = {node["id"]: node["total"] for node in nodes}
    assert totals[data.ROOT] == [shown[0].before, shown[0].after]
    up, down = by_id["blocks.1.up"], by_id["blocks.1.down"]
    assert totals["blocks.1"] == [up[which] + down[which] for which in ("before", "after")]


def test_blocks_stand_in_the_order_of_their_numbers():
    modules = [{"name": f"m.{i}.fc", "scheme": None, "before": 8, "after": 8} for i in random.sample(range(12), 12)]
    inner = [node["id"] for node in data.tree(modules) if node["parent"] == "m"]
    assert inner == [f"m.{i}" for i in range(12)]


def test_the_tree_begins_where_there_is_something_to_choose_from(shown):
    assert data.top(data.tree(shown[0].modules)) == data.ROOT
    assert data.top(data.tree(made_up(30).modules)) == "model.layers"
    assert data.top(data.tree(made_up(1).modules)) == "model.layers.0" and data.top([]) == data.ROOT


def test_a_module_with_tensors_and_children_gets_a_leaf_for_its_own():
    modules = [{"name": n, "scheme": None, "before": 1, "after": 1} for n in ("", "a", "a.b")]
    leaves = {n["id"]: n["parent"] for n in data.tree(modules) if "after" in n}
    assert leaves == {"(own)": data.ROOT, "a.(own)": "a", "a.b": "a"}


def test_a_report_in_memory_says_the_same_as_its_folder(folders):
    quantizer = quantized(SVD)
    alone, whole = data.from_report(quantizer.report), data.from_report(quantizer.report, model=quantizer.model)
    assert whole.whole and not alone.whole and alone.rows != whole.rows
    assert whole.after == data.read(folders[0]).after
    assert alone.after == sum(row.bytes_after for row in quantizer.report.layers)
    assert whole.rows[0]["options"]["rank"] == 8


def test_layers_that_lose_nothing_do_not_lift_the_mean_of_the_others():
    found = made_up(5)
    known = [row["output_sqnr"] for row in found.rows if row["output_sqnr"] is not None]
    found.rows[0]["output_sqnr"] = 311.0
    assert found.sqnr == pytest.approx(sum(known[1:]) / 3)
    for row in found.rows:
        row["output_sqnr"] = 311.0
    assert found.sqnr == 311.0


def test_sizes_are_rounded_as_the_script_of_the_page_does():
    sizes = [random.randrange(1 << 34) >> random.randrange(30) for _ in range(50)]
    for bytes_ in (0, 1023, 334080, 3 * 256, 1048575, *sizes):
        number, unit = page.size(bytes_).split()
        exact = Fraction(bytes_, {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}[unit])
        assert Fraction(number) - Fraction(1, 20) <= exact < Fraction(number) + Fraction(1, 20), "halves go up"
    assert page.size(334080) == "326.3 KiB"  # 326.25


def test_the_mean_weight_error_is_that_of_all_weights_together(shown):
    square = weights = 0
    for row in shown[0].rows:
        count = row["in_features"] * row["out_features"]
        square, weights = square + count * row["weight_error"] ** 2, weights + count
    assert shown[0].weight_error == pytest.approx((square / weights) ** 0.5)


@pytest.mark.parametrize("damage", ["missing", "types", "no report", "no json"])
def test_what_is_no_report_is_refused_in_words(tmp_path, damage):
    folder = saved(tmp_path / "out", "w8a16", details=False)
    file = folder / "report.json"
    if damage == "missing":
        with pytest.raises(CheckpointError, match="no such folder or file"):
            data.read(tmp_path / "nothing")
        return
    if damage == "no report":
        file.unlink()
    else:
        file.write_text('{"layers": [{"name": 3}]}' if damage == "types" else "[")
    with pytest.raises(CheckpointError, match=r"report\.json"):
        data.read(folder)


def test_details_of_the_weights_can_be_had_later_from_the_float_model():
    original = Small()
    quantizer, other = Quantizer(copy.deepcopy(original)), Quantizer(copy.deepcopy(original))
    quantizer.quantize("w8a32", progress=False)
    other.quantize("w8a32", progress=False, details=True)
    later = data.from_report(quantizer.report, model=quantizer.model)
    fill_details(later, original, quantizer.model)
    for row, twin in zip(later.rows, other.report.layers, strict=True):
        assert row["details"] == twin.details and sum(row["details"]["weight"]["after"])
    with pytest.raises(CheckpointError, match="not made from that"):
        fill_details(later, nn.Sequential(nn.Linear(3, 3)), quantizer.model)


# -- the page ----------------------------------------------------------------------------------------------------------


def test_the_page_fetches_nothing(shown):
    parsed = Page(page.render(shown))
    for tag, attributes in parsed.tags:
        assert tag not in ("iframe", "object", "embed", "img", "base")
        assert not attributes.get("src") and attributes.get("href", "data:").startswith("data:")
    assert "url(" not in page._file("page.css") and "@import" not in page._file("page.css")
    assert not re.search(r"fetch\(|XMLHttpRequest|https?:", page._file("page.js"))


def test_the_table_has_a_row_for_each_layer_with_its_numbers(shown):
    parsed = Page(page.render(shown))
    titles = [title for title in parsed.rows[0] if title not in page.COMPARED.values()]
    assert titles[:7] == [title for title, _ in page.COLUMNS]
    rows = {(tuple(row[:2])): row for row in parsed.rows}
    for found in shown:
        for layer in found.rows:
            row = rows[layer["name"], layer["scheme"]]
            assert row[2] == f"{layer['out_features']}×{layer['in_features']}"
            assert row[3] == f"{100 * layer['weight_error']:.2f} %" and row[5] == f"{layer['output_sqnr']:.1f} dB"
    labels = {tag for tag, _ in parsed.tags}
    assert {"main", "header", "footer", "h1", "label", "select"} <= labels
    assert [a["lang"] for tag, a in parsed.tags if tag == "html"] == ["en"]


def test_the_data_of_the_page_is_what_was_recorded(shown):
    found = Page(page.render(shown)).data
    assert [r["name"] for r in found["reports"]] == ["four", "eight"]
    for report, source in zip(found["reports"], shown, strict=True):
        assert [row["details"] for row in report["rows"]] == [row["details"] for row in source.rows]
        assert len(report["error"]) == len(report["sqnr"]) == 6
        assert report["after"] == source.after
    assert {row["name"] for row in found["tradeoff"]} == {"four", "eight"}


def test_no_name_breaks_out_of_the_page():
    found = made_up(9, name=HOSTILE, hostile=True, mixed={"</script>": "</script><b>"}, note="</script><i>")
    parsed = Page(page.render([found, made_up(3)]))
    tags = [tag for tag, _ in parsed.tags]
    assert tags.count("script") == 3 and not {"img", "b", "i"} & set(tags)
    assert parsed.data["reports"][0]["rows"][0]["name"].endswith(HOSTILE)
    assert "49" not in "".join(parsed.rows[1][:1]) and parsed.rows[1][0] == found.rows[0]["name"]


def test_fields_that_are_not_known_are_shown_and_what_is_not_finite_is_null():
    found = made_up(2, smooth_alpha=0.35, won={"rotation": 0.5, "gptq": float("nan")}, chosen="auto")
    parsed = Page(page.render([found]))
    assert parsed.rows[0][9:11] == ["smooth alpha", "chosen"] and parsed.rows[1][9:11] == ["0.35", "auto"]
    extra = parsed.data["reports"][0]["rows"][0]["extra"]
    assert extra == {"smooth_alpha": 0.35, "won": {"rotation": 0.5, "gptq": None}, "chosen": "auto"}


def test_fields_that_a_later_version_wrote_are_read(folders, tmp_path):
    report = json.loads((folders[0] / "report.json").read_text())
    report["layers"][0]["kurtosis"] = 0.25
    (tmp_path / "r.json").write_text(json.dumps(report))
    assert data.read(tmp_path / "r.json").extra == ["rank", "smooth_alpha", "kurtosis"]


def test_the_advice_stands_on_the_page_with_the_worst_layer_first():
    text = page.render([made_up(40)])
    assert 'data-layer="model.layers.1.proj0"' in text.split('class="advice"')[1].split("</li>")[0]
    assert text.count('class="flagged"') == 2  # the outlier, and the one without a ratio


def test_where_outputs_are_known_the_worst_of_them_comes_first():
    rows = [{**row, "output_sqnr": 30.0, "weight_error": 0.1} for row in made_up(20).rows]
    rows[4] |= {"output_sqnr": 20.0, "weight_error": 0.11}
    rows[5] |= {"output_sqnr": 10.5, "weight_error": 0.05}
    assert data.Shown("", rows, []).flagged == [5, 4]


def test_what_stays_in_float_is_named_where_it_is_much_of_the_result():
    blocks = [{"name": f"blocks.{i}.experts", "scheme": None, "before": 90, "after": 90} for i in range(3)]
    small = [{"name": "norm", "scheme": None, "before": 1, "after": 1}]
    done = [{"name": "fc", "scheme": "w8a16", "before": 400, "after": 100}]
    (note,) = notes_on_rest(blocks + small + done)
    assert "271 B of the 371 B (73 %)" in note and "blocks.{0-2}.experts x3 (270 B), and others" in note
    assert "norm" not in note and "embedding_w8" not in note
    (note,) = notes_on_rest([{"name": "embed_tokens", "scheme": None, "before": 90, "after": 90}, *done])
    assert "embed_tokens (90 B)." in note and "embedding_w8" in note
    embedders = ("emb.timestep_embedder.linear_1", "x_embedder", "pos_embed.proj")
    (note,) = notes_on_rest([{"name": n, "scheme": None, "before": 90, "after": 90} for n in embedders] + done)
    assert "x_embedder" in note and "embedding_w8" not in note, "these are linear layers"
    assert notes_on_rest(small + done) == [] == notes_on_rest([])


def test_all_advice_stands_together_as_rules_of_a_recipe():
    found = made_up(40)
    rules = yaml.safe_load(found.rules)
    assert [rule["match"] for rule in rules] == [["model.layers.1.proj0"]]  # the other has no rule that helps
    Recipe.from_dict({"scheme": "w4a4_svd", "rules": rules})
    assert "<wbr>proj0</button>" in page.render([found]) and found.rules.splitlines()[0] in page.render([found])


def test_a_name_may_be_broken_after_dots_and_is_escaped():
    assert page.breakable("a.b_c<i>") == "a.<wbr>b_<wbr>c&lt;i&gt;"


def test_empty_and_rootless_reports_have_a_page(tmp_path):
    Report(()).save_html(tmp_path / "r.html")
    assert "No layer stands out" in (tmp_path / "r.html").read_text(encoding="utf-8")
    root = nn.Linear(32, 16)
    quantizer = Quantizer(root)
    quantizer.quantize("w8a32", progress=False, details=True)
    quantizer.report.save_html(tmp_path / "r.html", model=quantizer.model)
    assert Page((tmp_path / "r.html").read_text(encoding="utf-8")).rows[1][0] == data.ROOT


# -- figures as files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", drawing.KINDS)
def test_every_figure_is_drawn_with_what_it_shows(kind, shown, tmp_path, capfd):
    drawing.draw(kind, shown, "blocks.1.up", tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text(encoding="utf-8")
    marks = {"error": 6, "sqnr": 6, "weights": 64, "activations": 64, "spectrum": 48, "tree": 8, "compare": 6}
    assert text.count("<path") >= marks.get(kind, 2) and "ERROR" not in capfd.readouterr().err
    words = {"spectrum": "in the branch", "tree": "blocks", "tradeoff": "eight", "activations": "activations"}
    assert words.get(kind, "four" if kind not in drawing.OF_ONE_LAYER else "blocks.1.up") in text


@pytest.mark.parametrize("largest", [3e-4, 0.7, 67.0, 400.0, 30000.0])
def test_numbers_at_an_axis_are_written_out(largest):
    bins = [{"from": largest * i / 9, "to": largest * (i + 1) / 9, "share": 5, "which": "before"} for i in range(-9, 9)]
    pairs = [{"index": 1, "name": "a", "report": r, "value": v} for r, v in (("x", largest / 2), ("y", largest))]
    specs = [(figures.histogram("weights"), bins), *((figures.compare(m), pairs) for m in figures.MEASURES)]
    for spec, found in specs:
        svg = drawing.converter().vegalite_to_svg(figures.with_rows(spec, found))
        assert not re.search(r"<text[^>]*>[^<]*\de[+−-]?\d", svg)


@pytest.mark.parametrize("suffix", MAGIC)
def test_the_name_of_the_file_says_its_format(suffix, shown, tmp_path):
    drawing.draw("tree", shown[:1], None, tmp_path / f"a{suffix}")
    assert (tmp_path / f"a{suffix}").read_bytes().startswith(MAGIC[suffix])


@pytest.mark.parametrize(
    ("kind", "which", "layer", "name", "message"),
    [
        ("weights", 0, None, "a.svg", "--layer"),
        ("weights", 0, "blocks.1.upp", "a.svg", "did you mean 'blocks.1.up'"),
        ("weights", 1, "blocks.1.up", "a.svg", "--against"),
        ("compare", 0, None, "a.svg", "two reports"),
        ("sqnr", -1, None, "a.svg", "no layer has an output SQNR, which takes calibration data"),
        ("tree", 0, None, "a.gif", r"\.svg, \.png or \.pdf"),
    ],
)
def test_what_cannot_be_drawn_says_why(kind, which, layer, name, message, shown, tmp_path):
    reports = [*shown, data.from_report(Report.of(Quantizer(nn.Linear(32, 32)).quantize("w8a16")))]
    with pytest.raises((drawing.FigureError, CheckpointError), match=message):
        drawing.draw(kind, [reports[which]], layer, tmp_path / name)
    assert not (tmp_path / name).exists()


# -- the command line --------------------------------------------------------------------------------------------------


@pytest.fixture
def run(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")

    def run(*args):
        code = cli.main([str(a) for a in args])
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


def test_the_terminal_report_fits_into_80_columns(run, folders):
    code, out, err = run("report", *folders)
    assert code == 0 and err == "" and max(map(len, out.splitlines())) <= 80
    assert "blocks.{0-2}.down x3" in out, "a name of usual length stands in one line"
    assert all(part in out for part in ("four", "eight", "to check"))


def test_the_command_writes_the_page_and_the_figures(run, folders, tmp_path):
    code, out, err = run("report", *folders, "--html", tmp_path / "r.html")
    assert code == 0 and out == "" and "wrote" in err
    assert [r["name"] for r in Page((tmp_path / "r.html").read_text(encoding="utf-8")).data["reports"]] == [
        "four",
        "eight",
    ]
    code, _, err = run("plot", folders[0], "--kind", "spectrum", "--layer", "blocks.0.up", "-o", tmp_path / "s.png")
    assert code == 0 and (tmp_path / "s.png").read_bytes().startswith(MAGIC[".png"])


def test_reports_of_one_name_are_told_apart_by_their_paths(run, folders, tmp_path):
    twins = []
    for parent, folder in zip(("a", "b"), folders, strict=True):
        twins.append(shutil.copytree(folder, tmp_path / parent / "out"))
    assert run("report", *twins, "--html", tmp_path / "r.html")[0] == 0
    reports = Page((tmp_path / "r.html").read_text(encoding="utf-8")).data["reports"]
    assert [report["name"] for report in reports] == [str(twin) for twin in twins]


def test_wrong_usage_is_told_before_anything_is_read(run, tmp_path):
    assert run("plot", tmp_path / "nothing", "--kind", "tree", "-o", "a.gif")[0] == 1
    code, _, err = run("plot", tmp_path / "nothing", "--kind", "tree", "--layer", "x", "-o", "a.svg")
    assert code == 2 and "--layer is for weights" in err
    assert run("plot", tmp_path, "--kind", "cake", "-o", "a.svg")[0] == 2
    code, _, err = run("report", tmp_path / "nothing", "--html", tmp_path / "r.html")
    assert code == 1 and "no such folder" in err and not (tmp_path / "r.html").exists()


def test_every_kind_of_the_command_is_a_figure():
    assert [kind.value for kind in Kind] == sorted(drawing.KINDS, key=[k.value for k in Kind].index)
    assert {kind.value for kind in Kind} == set(drawing.KINDS)


def test_without_the_extra_the_message_says_what_to_install(run, folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    code, _, err = run("report", folders[0], "--html", "r.html")
    assert code == 1 and "pip install 'qgraft[report]'" in err
    assert run("report", folders[0])[0] == 0, "the terminal needs none of it"


def test_a_folder_of_the_float_model_is_compared_with_or_quantized_with_its_page(run, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
                                     vocab_size=40, max_position_embeddings=16)  # fmt: skip
    model = transformers.BertModel(config).eval()
    model.save_pretrained(tmp_path / "float")
    save(Quantizer(model).quantize("w8a32", progress=False), tmp_path / "out")
    code, _, err = run("report", tmp_path / "out", "--against", tmp_path / "float", "--html", tmp_path / "r.html")
    assert code == 0, err
    rows = Page((tmp_path / "r.html").read_text(encoding="utf-8")).data["reports"][0]["rows"]
    assert len(rows) == 7
    for row in rows:
        details = row["details"]
        assert sum(details["weight"]["before"]) == row["in_features"] * row["out_features"]
        assert len(details["spectrum"]["values"]) == 32 and details["input"] is None
    code, _, err = run("report", tmp_path / "out" / "report.json", "--against", tmp_path / "float")
    assert code == 2 and "report alone" in err
    # The same float folder, quantized with its page at once.
    for how in ("--no-stream", "--stream"):
        html, out = tmp_path / f"{how}.html", tmp_path / how.strip("-")
        code, _, err = run("quantize", tmp_path / "float", "-r", "w8a32", how, "--out", out, "--report", html)
        assert code == 0, err
        found = Page(html.read_text(encoding="utf-8")).data["reports"][0]["rows"]
        assert [row["details"]["weight"] for row in found] == [row["details"]["weight"] for row in rows]


def test_random_state_is_left_alone_by_drawing(shown, tmp_path):
    torch.manual_seed(3)
    first = torch.rand(2)
    torch.manual_seed(3)
    page.render(shown)
    assert torch.equal(first, torch.rand(2))
