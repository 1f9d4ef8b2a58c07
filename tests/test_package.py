"""The package as it is installed and imported."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import qgraft

try:
    import tomllib
except ImportError:  # Python 3.10, where pytest brings the same library under its old name
    import tomli as tomllib

ROOT = Path(qgraft.__file__).parent


def test_kernels_never_hides_the_hugging_face_package_of_that_name(tmp_path):
    """`kernels` in the repository root is a namespace portion, over which any installed package wins."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    fake = tmp_path / "site" / "kernels"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text("HUB = True")
    code = f"import sys; sys.path.append({str(tmp_path / 'site')!r}); import kernels; assert kernels.HUB"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_every_package_folder_is_listed_in_pyproject():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {
        ".".join(("qgraft", *file.parent.relative_to(ROOT).parts))
        for file in ROOT.rglob("*.py")
        if not any(p.startswith(".") or p in ("tests", "docs", "build", "dist") for p in file.relative_to(ROOT).parts)
    }
    assert folders == listed


def test_every_dependency_says_why_it_is_there():
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    start, stop = lines.index("dependencies = ["), lines.index("[project.scripts]")
    for number, line in enumerate(lines[start:stop], start):
        if line.strip().startswith('"'):
            assert "#" in line or lines[number - 1].strip().startswith("#") or "qgraft[" in line, line


def test_the_wheel_holds_recipes_and_the_type_marker(tmp_path):
    pytest.importorskip("setuptools")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
        ".",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    assert {
        "qgraft/__init__.py",
        "qgraft/py.typed",
        "qgraft/recipes/w4a4_svd.yaml",
        "qgraft/kernels/ops.py",
        "qgraft/docs/examples/triton_w4a8.py",
    } <= names
    assert not any(name.startswith(("tests/", "qgraft/tests", "kernels/")) for name in names)


def test_the_version_is_told_in_one_voice():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == qgraft.__version__
    assert qgraft.__version__ in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize(
    "arrow", [("layers", "quantizer"), ("layers", "recipes"), ("kernels", "layers"), ("recipes", "kernels")]
)
def test_arrows_go_down_only(arrow):
    low, high = arrow
    for file in (ROOT / low).rglob("*.py"):
        assert f"..{high}" not in file.read_text(), f"{file} imports {high}"
