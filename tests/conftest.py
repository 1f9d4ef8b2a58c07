"""Shared by all tests: no network, repeatable but not fixed randomness, and the devices to test on."""

import os

# Before any import of transformers: a test that would reach for a hub must fail, not hang.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before any import of torch: several workers, and what they start, share the cores. Threads of one that wait for
# those of another are far slower than one thread.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))))

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
