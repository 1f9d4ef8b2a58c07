"""Names of layers in the tables of the terminal: never cut, broken at dots, whole where lines are searched for them."""

import io
import random

import pytest
from report_models import made_up
from rich.console import Console

from qgraft.quantizer import Report, cli, tables
from qgraft.quantizer.html import data
from qgraft.quantizer.names import Name, unbroken

LONG = "up_projection_with_a_very_long_name_indeed_for_no_good_reason"


def lines(name, width):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(Name(name))
    return console.file.getvalue().splitlines()


def test_a_name_goes_on_after_a_dot_and_loses_nothing():
    assert lines("encoder.layer.{0-5}.attention.self.query x6", 22) == [
        "encoder.layer.{0-5}.",
        "attention.self.query",
        "x6",
    ]
    for _ in range(50):
        parts = ["".join(random.choices("abc_[]层", k=random.randint(1, 40))) for _ in range(random.randint(1, 6))]
        name, width = ".".join(parts), random.randint(8, 60)
        assert "".join(lines(name, width)) == name


def report(rows):
    return Report.from_dict({"layers": [{k: v for k, v in row.items() if k in data.KNOWN} for row in rows]})


@pytest.fixture
def rows():
    found = made_up(12).rows
    for row in found:
        row["name"] = row["name"].replace("proj", f"{LONG}.proj")
        row.pop("options"), row.pop("details")
    return found


def test_a_table_of_long_names_fits_where_it_must(rows):
    for width in (80, 120):
        console = Console(file=io.StringIO(), width=width, color_system=None)
        console.print(report(rows).table(every=True))
        found = console.file.getvalue().splitlines()
        assert max(map(len, found)) <= width
        beside = next(line for line in found if "scheme" in line).index("scheme")
        names = "".join(line[:beside].strip() for line in found)
        assert all(row["name"] in names for row in rows), "all of each name is there"


def test_the_width_for_whole_names_is_what_they_need(rows):
    table = report(rows).table(every=True)
    console = Console(file=io.StringIO(), width=80, color_system=None)
    console.width = unbroken(table, console)
    console.print(table)
    found = console.file.getvalue().splitlines()
    for row in rows:
        (line,) = [line for line in found if row["name"] in line and "w4a4_svd" in line]
        assert line.rstrip().endswith("0.50")
    assert unbroken(tables.Table("report", "size"), console) is None


def test_in_a_pipe_a_name_stands_in_one_line_without_escapes(rows, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    report(rows).save(tmp_path / "report.json")
    assert cli.main(["report", str(tmp_path / "report.json"), "--every"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    for row in rows:
        assert sum(row["name"] + " " in line and "w4a4_svd" in line for line in out.splitlines()) == 1
