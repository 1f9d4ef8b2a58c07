"""`qgraft warmup`, the tables of tiles, and the choice among tiles. Times are made up: there need be no GPU."""

import json

import pytest
import torch
from torch import nn

from qgraft import Quantizer, save
from qgraft.quantizer import cli


@pytest.fixture
def folder(tmp_path):
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64), nn.Linear(64, 96))
    save(Quantizer(model).quantize("w8a16"), tmp_path / "model")
    return tmp_path / "model"


def test_warmup_runs_each_kind_of_layer_once_and_says_what_it_does_without_a_gpu(folder, capsys):
    assert cli.main(["warmup", str(folder), "--tokens", "1,4", "--device", "cpu"]) == 0
    said = capsys.readouterr().err
    assert "no GPU kernel is compiled" in said and "ran 2 kinds of layers (3 in all) with 1, 4 tokens" in said


@pytest.mark.parametrize("tokens", ["", "0", "1,x", "-4"])
def test_warmup_refuses_numbers_that_are_none(folder, tokens, capsys):
    assert cli.main(["warmup", str(folder), f"--tokens={tokens}"]) == 2
    assert "give numbers such as 1,512" in capsys.readouterr().err


def test_warmup_does_not_tune_where_there_is_nothing_to_tune(folder, capsys):
    assert cli.main(["warmup", str(folder), "--tune", "--device", "cpu"]) == 2
    assert "there is none here" in capsys.readouterr().err


# ---- tables and tuning ----------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """The modules, on a device that has no shipped table, with a cache folder of its own."""
    pytest.importorskip("triton", reason="the kernels are written in Triton, which is not installed")
    from qgraft.kernels.gpu import configs, tuning

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(configs, "device_name", lambda x: "Some GPU 9000")
    configs.forget()
    yield configs, tuning
    configs.forget()


def rule(block: int) -> dict[str, int]:
    return {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": block, "num_warps": 4, "num_stages": 4}


def test_the_fastest_tile_is_kept_and_used_for_that_shape_only(gpu):
    configs, tuning = gpu
    x, tried = torch.empty(0), []

    def run(m=16, n=4096, k=2048):
        return configs.tile("w8a16", x, m, n, k, rule, 128)

    def clock(call):
        tile = call()
        tried.append(tile)
        return 1.0 / tile["BLOCK_N"] + tile["num_stages"] * 1e-6  # wide is fast, deep costs a little

    rows = tuning.tune(run, clock)
    assert 4 <= len(tried) <= tuning.CANDIDATES and len({json.dumps(t) for t in tried}) == len(tried)
    (row,) = rows
    assert row["tile"]["BLOCK_N"] == 128 and run() == rule(128)  # nothing is left behind by the trial
    tuning.keep("Some GPU 9000", rows)
    assert run() == run(m=1) == row["tile"]
    assert run(m=17) == run(n=64) == run(k=4096) == rule(128)
    assert configs.tile("w8a16", x, 16, 4096, 2077, rule, 32) == rule(32)  # rows that start anywhere go by the rule
    tuning.keep("Some GPU 9000", [row | {"n": 64}])
    assert run() == run(n=64) == row["tile"]


def test_a_tile_is_not_changed_for_less_than_the_noise(gpu):
    configs, tuning = gpu
    assert tuning.tune(lambda: configs.tile("w8a8", torch.empty(0), 1, 64, 64, rule, 64), lambda call: 1.0) == []


@pytest.fixture
def at_first_use(gpu, monkeypatch):
    """A kernel that tunes itself; told how many tiles were timed, and how long that takes."""
    configs, tuning = gpu
    from qgraft.kernels.gpu import first_use

    timed = []

    def clock(call):
        timed.append(call())
        return 1.0 / timed[-1]["BLOCK_N"]

    def kernel(x, qweight):
        return configs.tile("w8a16", x, x.shape[0], *qweight.shape, rule, 128)

    monkeypatch.setattr(tuning, "seconds", clock)
    monkeypatch.setattr(first_use, "_left", first_use.BUDGET)
    return first_use, kernel, timed


def test_a_shape_is_tuned_at_its_first_use_and_never_again(at_first_use):
    first_use, kernel, timed = at_first_use
    run = first_use.tuned(kernel)

    def call(m, n, k):
        return run(torch.empty(m, k), torch.empty(n, k))

    assert call(17, 64, 96) == rule(128)  # the very first call has been made by then
    assert 4 <= len(timed) <= 8 and call(17, 64, 96) == call(32, 64, 96) == rule(128) | {"BLOCK_N": 128, "num_warps": 8}
    tried = len(timed)
    call(31, 64, 96), call(18, 64, 96)
    assert len(timed) == tried
    for m, n, k in ((33, 64, 96), (16, 64, 96), (17, 96, 64)):
        call(m, n, k)
        tried += 8
        assert tried - 4 <= len(timed) <= tried
        tried = len(timed)
    call(17, 64, 77)  # rows that start anywhere have no table
    again = first_use.tuned(kernel)  # another process, and the same disk
    again(torch.empty(20, 96), torch.empty(64, 96))
    assert len(timed) == tried


def test_first_uses_stop_when_their_time_is_up(at_first_use, monkeypatch):
    first_use, kernel, timed = at_first_use
    monkeypatch.setattr(first_use, "_left", 1e-9)
    run = first_use.tuned(kernel)
    with pytest.warns(UserWarning, match="qgraft warmup --tune"):
        run(torch.empty(1, 64), torch.empty(32, 64))
    run(torch.empty(1, 64), torch.empty(64, 64))
    assert not timed


def test_without_being_asked_no_kernel_tunes_itself(monkeypatch):
    from qgraft.kernels.gpu import first_use

    for value, asked in ((None, False), ("0", False), ("1", True)):
        monkeypatch.delenv("QGRAFT_TUNE", raising=False)
        if value is not None:
            monkeypatch.setenv("QGRAFT_TUNE", value)
        assert first_use.asked_for() is asked


@pytest.mark.parametrize("content", ["{", '{"rows": 1}', '{"rows": [{"kernel": "w8a16", "tile": {"BLOCK_N": "64"}}]}'])
def test_a_damaged_table_is_named_and_passed_over(gpu, content):
    configs, _ = gpu
    file = configs.cache_file("Some GPU 9000")
    file.parent.mkdir(parents=True)
    file.write_text(content)
    with pytest.warns(UserWarning, match="cannot be used"):
        assert configs.tile("w8a16", torch.empty(0), 1, 64, 64, rule, 64) == rule(64)


def test_the_shipped_tables_are_tables_and_say_whether_they_were_measured(gpu):
    configs, _ = gpu
    files = list(configs.SHIPPED.glob("*.json"))
    assert files
    for file in files:
        table = configs.checked(json.loads(file.read_text()))
        assert table["devices"] and isinstance(table["measured"], bool)
        assert all(row["instructions_per_weight"] > 0 for row in table["rows"])
    assert configs.tables("NVIDIA H200")[0]["devices"] == ["H200", "H100"]


# ---- programs that share a tile -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tiles, steps, processors", [(128, 32, 132), (64, 16, 132), (1, 100, 132), (1000, 8, 132), (3, 1, 8)]
)
def test_splits_fill_the_device_and_leave_no_share_empty(tiles, steps, processors):
    pytest.importorskip("triton")
    from qgraft.kernels.gpu import split_k

    splits = split_k._splits(tiles, steps, processors)
    each = -(-steps // splits)
    assert 1 <= splits <= split_k.MAX_SPLITS and (splits - 1) * each < steps <= splits * each
    if tiles * 16 <= processors and steps > 40:
        assert splits > 8
    if tiles > 4 * processors:
        assert splits == 1
