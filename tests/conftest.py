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
import random

import pytest
import torch


@pytest.fixture(autouse=True)
def seed(request) -> int:
    """New random numbers in every run; a failure prints the seed, and QGRAFT_TEST_SEED=<seed> repeats it."""
    value = int(os.environ.get("QGRAFT_TEST_SEED", random.SystemRandom().randrange(2**31)))
    torch.manual_seed(value)
    random.seed(value)
    print(f"QGRAFT_TEST_SEED={value}")
    return value


def pytest_collection_finish() -> None:
    """What has been imported stays: the garbage collector need not walk through it again for every test."""
    gc.collect()
    gc.freeze()
