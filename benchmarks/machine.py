"""What a number was measured on: versions, processor, threads. No host name and no path."""

import importlib.metadata
import json
import os
import platform
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import qgraft

# What decides how fast int8 and bfloat16 products are on a CPU.
FEATURES = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "i8mm",
    "bf16",
)


def describe(device: str = "cpu") -> dict[str, Any]:
    """Versions, processor and, for device "cuda", the GPU, as plain data."""
    cpu_name, features = _cpu()
    found = {
        "versions": {"qgraft": qgraft.__version__, "python": platform.python_version(), **_versions()},
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name,
        "cpu_features": features,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        found["gpu"] = gpu.name
        found["gpu_memory_bytes"] = gpu.total_memory
        found["gpu_processors"] = gpu.multi_processor_count
        found["versions"]["cuda"] = torch.version.cuda or f"hip {torch.version.hip}"
    return found


def in_words(machine: dict[str, Any]) -> str:
    """One line for a caption."""
    v = machine["versions"]
    return (
        f"{machine.get('gpu') or machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"torch {v['torch']}, Python {v['python']}"
    )


def command(module: str, argv: Sequence[str]) -> str:
    """The command line that gives these numbers again."""
    return shlex.join(["python", "-m", f"qgraft.benchmarks.{module}", *argv])


def write_json(results: dict[str, Any], path: Path) -> None:
    """Make the folder if it is not there, and replace the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _versions() -> dict[str, str]:
    versions = {}
    for name in ("torch", "transformers", "triton", "numpy", "safetensors"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _cpu() -> tuple[str, list[str]]:
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.exists() else ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    present = set(flags.group(1).split()) if flags else set()
    return name.group(1) if name else platform.processor() or platform.machine(), [f for f in FEATURES if f in present]
