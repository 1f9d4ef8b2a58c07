"""The command line as a Unix user expects it: exit codes, stdout and stderr, pipes, Ctrl-C, help."""

import contextlib
import errno
import io
import os
import signal
import subprocess
import sys
import threading

import pytest

import qgraft
from qgraft import Recipe, load_recipe, shipped_recipes
from qgraft.quantizer import CheckpointError, cli, cli_text
from qgraft.quantizer.cli_output import exit_codes, set_debug

COMMANDS = ("quantize", "allocate", "plan", "recipes", "inspect", "report", "plot", "export", "eval", "bench")
PROGRAM = [sys.executable, "-m", "qgraft.quantizer.cli"]


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs a command line in this process: (exit code, stdout, stderr)."""
    monkeypatch.delenv("QGRAFT_DEBUG", raising=False)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*args):
        code = cli.main([str(a) for a in args])
        output = capsys.readouterr()
        return code, output.out, output.err

    yield run
    set_debug(False)


def failing_with(monkeypatch, error):
    """Lets `qgraft recipes` fail in a way."""

    def fail():
        raise error

    monkeypatch.setattr("qgraft.quantizer.cli_recipes.list_recipes", fail)


# -- help --------------------------------------------------------------------------------------------------------------


def test_help_names_every_command_and_an_example(run):
    code, out, err = run("--help")
    assert code == 0 and err == ""
    assert all(f"\n  {command} " in out for command in COMMANDS)
    assert "Example: qgraft quantize ./model" in out
    assert "..." not in out.replace("[ARGS]...", ""), "no summary is cut off"


@pytest.mark.parametrize("command", COMMANDS[:-1])
def test_help_of_each_command_has_an_example_on_a_line_of_its_own(run, command):
    code, out, err = run(command, "-h")
    assert code == 0 and err == ""
    assert any(line.strip().startswith(f"Example: qgraft {command}") for line in out.splitlines())
    assert max(map(len, out.splitlines())) <= 80


def test_version(run):
    assert run("--version") == (0, f"qgraft {qgraft.__version__}\n", "")


# -- exit codes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args",
    [
        ["no-such-command"],
        ["plan"],
        ["plan", "model"],
        ["plan", "model", "-r", "w8a16", "--no-such-option"],
        ["quantize", "model", "-r", "w8a16"],
        ["quantize", "model", "-r", "w8a16", "--out", "out", "--dtype", "int3"],
        ["eval", "model", "--text", "t.txt", "--window", "1"],
        ["eval", "model", "--text", "t.txt", "--device", "no-such-device"],
    ],
)
def test_wrong_usage_exits_with_2_and_says_why_on_stderr(run, args):
    code, out, err = run(*args)
    assert code == 2 and out == ""
    assert "Usage: qgraft" in err and "Error: " in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["plan", "nowhere", "-r", "w8a16"], "nowhere: no such folder"),
        (["plan", ".", "-r", "w8a61"], "did you mean 'w8a16'"),
        (["recipes", "no.yaml"], "no.yaml: no such file"),
        (["inspect", "nowhere"], "nowhere: no such folder"),
        (["eval", "nowhere", "--text", "t.txt"], "nowhere: no such folder"),
        (["quantize", "m", "-r", "w8a16", "--out", "o", "--calibration", "no.txt"], "no.txt: No such file"),
    ],
)
def test_failed_work_exits_with_1_and_one_message(run, args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*args)
    assert code == 1 and out == ""
    assert err.startswith("qgraft: error: ") and message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("error", [ImportError("pip install 'qgraft[hf]'"), PermissionError(13, "no", "x")])
def test_missing_extras_and_what_the_system_refuses_are_failures_too(run, monkeypatch, error):
    failing_with(monkeypatch, error)
    code, _, err = run("recipes")
    assert code == 1 and err in ("qgraft: error: pip install 'qgraft[hf]'\n", "qgraft: error: x: no\n")


@pytest.mark.parametrize("where", ["option", "global option", "environment"])
def test_debug_shows_the_traceback(run, monkeypatch, where):
    failing_with(monkeypatch, CheckpointError("broken"))
    if where == "environment":
        monkeypatch.setenv("QGRAFT_DEBUG", "1")
    args = {"option": ["recipes", "--debug"], "global option": ["--debug", "recipes"]}.get(where, ["recipes"])
    code, _, err = run(*args)
    assert code == 1 and "Traceback" in err and err.endswith("qgraft: error: broken\n")
    monkeypatch.delenv("QGRAFT_DEBUG", raising=False)
    assert "Traceback" not in run("recipes")[2], "and only where it was asked for"


def test_a_bug_is_not_dressed_up_as_a_failure(run, monkeypatch):
    failing_with(monkeypatch, KeyError("a bug"))
    with pytest.raises(KeyError):
        run("recipes")


def test_ctrl_c_exits_with_130(run, monkeypatch):
    failing_with(monkeypatch, KeyboardInterrupt("layer 3 of 9"))
    assert run("recipes") == (130, "", "qgraft: interrupted\n")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_real_ctrl_c_ends_a_waiting_command_without_a_traceback(tmp_path):
    os.mkfifo(tmp_path / "text")  # reading it waits for a writer, and opening it to write waits for the reader
    command = [*PROGRAM, "quantize", "m", "-r", "w8a16", "--out", "o", "--calibration", "text"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    guard = threading.Timer(120, process.kill)
    guard.start()
    writer = None
    try:
        while writer is None and process.poll() is None:
            try:
                writer = os.open(tmp_path / "text", os.O_WRONLY | os.O_NONBLOCK)
            except OSError as error:
                assert error.errno == errno.ENXIO  # nobody reads yet
                threading.Event().wait(0.05)
        out = None
        while out is None:
            process.send_signal(signal.SIGINT)
            # One that comes just before the read does not interrupt it.
            with contextlib.suppress(subprocess.TimeoutExpired):
                out, err = process.communicate(timeout=10)
    finally:
        guard.cancel()
        if writer is not None:
            os.close(writer)
    assert (process.returncode, out, err) == (130, "", "qgraft: interrupted\n")


# -- streams -----------------------------------------------------------------------------------------------------------


def test_a_reader_that_goes_away_is_no_reason_to_complain():
    """As in `qgraft recipes | head -1`."""
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run([*PROGRAM, "recipes"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (result.returncode, result.stderr) == (141, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_results_that_cannot_be_written_are_a_failure():
    with open("/dev/full", "w") as full:
        result = subprocess.run([*PROGRAM, "recipes"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("qgraft: error: ") and "No space left on device" in result.stderr


def test_a_pipe_gets_no_colours_and_80_columns():
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "FORCE_COLOR")}
    result = subprocess.run([*PROGRAM, "recipes"], capture_output=True, text=True, env=environment)
    assert result.returncode == 0 and result.stderr == ""
    assert "\x1b" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_warnings_are_one_line_on_stderr(capsys):
    import warnings

    with exit_codes():
        warnings.warn("the data is short", stacklevel=1)
    assert capsys.readouterr() == ("", "qgraft: warning: the data is short\n")


# -- recipes and bench -------------------------------------------------------------------------------------------------


def test_recipes_lists_what_ships(run):
    code, out, err = run("recipes")
    assert code == 0 and err == ""
    assert all(f" {name} " in out for name in shipped_recipes())


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_printed_recipe_keeps_its_comments_and_is_a_recipe(run, name):
    code, out, err = run("recipes", name)
    assert code == 0 and err == ""
    assert out.startswith(shipped_recipes()[name].read_text().rstrip())
    assert Recipe.from_yaml(out) == Recipe.from_yaml(shipped_recipes()[name].read_text())


def test_a_recipe_that_extends_another_shows_all_of_it_as_a_comment(run):
    _, out, _ = run("recipes", "w4a4_svd_fast")
    _, resolved = out.split("# With all that it extends:\n#\n")
    text = "\n".join(line.removeprefix("#").removeprefix("   ") for line in resolved.splitlines())
    assert Recipe.from_yaml(text) == load_recipe("w4a4_svd_fast")
    assert "extends" not in run("recipes", "w8a16")[1]


def test_bench_passes_its_arguments_on_and_its_exit_code_back(run, monkeypatch):
    seen = []
    monkeypatch.setattr("qgraft.benchmarks.run.main", lambda argv: seen.append(argv) or 1)
    code, _, _ = run("bench", "--scheme", "w8a16", "-x", "--help", "64x64")
    assert code == 1 and seen == [["--scheme", "w8a16", "-x", "--help", "64x64"]]


# -- text --------------------------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer: a token a letter, 1 before and 2 after a text."""

    model_max_length, pad_token = 10**30, None

    def __call__(self, text, add_special_tokens, verbose):
        ids = [ord(letter) for letter in text]
        return {"input_ids": [1, *ids, 2] if add_special_tokens else ids}


def test_text_is_cut_into_sequences_that_begin_and_end_as_the_model_is_used_to():
    pieces = cli_text.sequences(Letters(), "abcdefgh", tokens=5, samples=10)
    texts = ["".join(map(chr, piece[0, 1:-1].tolist())) for piece in pieces]
    assert texts == ["abc", "def", "gh"]
    assert all(piece[0, 0] == 1 and piece[0, -1] == 2 for piece in pieces)
    assert len(cli_text.sequences(Letters(), "abcdefgh" * 100, tokens=5, samples=4)) == 4


def test_a_limit_takes_the_first_tokens_of_the_text():
    text = "abc" * 1000
    assert cli_text.token_ids(Letters(), text).tolist() == [1, *map(ord, text), 2]
    assert cli_text.token_ids(Letters(), text, limit=5).tolist() == [1, *map(ord, "abca")]


@pytest.mark.parametrize(("raw", "message"), [(b" \n\t ", "holds no text"), (b"a\xff", r"not UTF-8 text \(byte 1\)")])
def test_what_is_no_text_is_refused(tmp_path, monkeypatch, raw, message):
    (tmp_path / "t").write_bytes(raw)
    with pytest.raises(qgraft.quantizer.QGraftError, match=message):
        cli_text.read_text(str(tmp_path / "t"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
    with pytest.raises(qgraft.quantizer.QGraftError, match="standard input: "):
        cli_text.read_text("-")
