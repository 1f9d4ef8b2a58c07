"""Shared by all tests: no network, repeatable but not fixed randomness, and the devices to test on."""

import os

# Before any import of transformers: a test that would reach for a hub must fail, not hang.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before any import of torch. Models here are so small that a second thread only waits for the first: on a busy machine
# of two cores that took ten times the processor time. What is tested with threads sets their number.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import hashlib
import random
from pathlib import Path

import pytest
import torch


def _seed_of_the_tree() -> str:
    """One seed for the very files that are tested: a tree that has passed passes again, and any change draws anew."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for folder in (".", "benchmarks", "kernels", "layers", "quantizer", "recipes", "tests"):
        for path in sorted(root.joinpath(folder).glob("*" if folder == "." else "**/*")):
            if path.suffix in {".py", ".h", ".cpp", ".yaml"}:
                digest.update(path.read_bytes())
    return str(int.from_bytes(digest.digest()[:4], "big"))


# In the environment, so that the workers of pytest-xdist and what tests start have it too.
if "QGRAFT_TEST_SEED" not in os.environ:
    os.environ["QGRAFT_TEST_SEED"] = _seed_of_the_tree()
elif os.environ["QGRAFT_TEST_SEED"] == "new":
    os.environ["QGRAFT_TEST_SEED"] = str(random.SystemRandom().randrange(2**32))


def _seed(what: str) -> int:
    value = f"{os.environ['QGRAFT_TEST_SEED']} {what}"
    value = int.from_bytes(hashlib.sha256(value.encode()).digest()[:4], "big")
    torch.manual_seed(value)
    random.seed(value)
    return value


@pytest.fixture(autouse=True)
def seed(request) -> int:
    """Every test has numbers of its own, whatever ran before it; a failure prints what repeats them.

    They are new for every change of the code, and for every run with QGRAFT_TEST_SEED=new.
    """
    print(f"QGRAFT_TEST_SEED={os.environ['QGRAFT_TEST_SEED']}")
    return _seed(f"{request.path.name} {request.node.name}")


def pytest_fixture_setup(fixturedef, request) -> None:
    """What a file's tests share is made before the first of them, thus before its seed, and needs one too."""
    if fixturedef.scope != "function":
        _seed(f"{request.path.name if fixturedef.scope == 'module' else ''} {fixturedef.argname}")


def pytest_collection_finish() -> None:
    """What has been imported stays: the garbage collector need not walk through it again for every test."""
    gc.collect()
    gc.freeze()
