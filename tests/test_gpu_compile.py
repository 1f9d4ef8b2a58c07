"""The GPU kernels through the compilers of four GPUs, none of which need be there.

Every launch that the wrappers can make is caught (they run on meta tensors), specialised as the just-in-time compiler
would, and compiled. Asserted: no register spills, shared and tensor memory that the GPU has, and the tensor-core
instruction that was meant. A kernel that asks for too much tensor memory compiles to a trap, so the last is no luxury.

Two processes do the work: this very file, as a script, once for each half of the cases.
"""

import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are written in Triton, which is not installed")

import triton
from triton.backends.compiler import GPUTarget

from qgraft.kernels.gpu import svdq_gemm, svdq_quantize, w8a16, w8a32

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
TENSOR_MEMORY_COLUMNS = 512
TOKENS = [16, 64, 1024]  # one of each kind of tile
GROUPS = [16, 32, 64, 128, 256]
CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")


# ---- the cases: kernel and arguments, as strings and numbers --------------------------------------------------------


def cases(target_name: str) -> list[tuple]:
    target = TARGETS[target_name]
    found = [("w8a16", m, 4096, 4096, dtype) for m in TOKENS for dtype in ("bfloat16", "float16")]
    found += [("w8a32", m, 4096, 4096, "float32") for m in TOKENS]
    # Shapes that forbid wide loads, and the single token, whose M the compiler knows.
    found += [("w8a16", m, 37, 77, "bfloat16") for m in (1, 16, 64, 301)]
    found += [("w8a32", m, 37, 77, "float32") for m in (1, 16, 64, 301)]

    # Codes: m, n, padded, group_size, two_level, act_bits, dtype, rank.
    found += [("gemm", m, 4096, 4096, 64, True, 4, dtype, 32) for m in TOKENS for dtype in DTYPES]
    found += [("gemm", m, 4096, 4096, group, True, 8, "bfloat16", 32) for m in (16, 1024) for group in GROUPS]
    found += [("gemm", m, 4096, 4096, group, False, 4, "bfloat16", 128) for m in (16, 1024) for group in GROUPS]
    found += [("gemm", 16, 4096, 4096, group, False, 8, "float32", 0) for group in (64, 128, 256)]
    found += [("gemm", 1024, 4096, 4096, group, False, 8, "float32", 0) for group in (16, 64, 256)]
    found += [("gemm", m, 37, 48, 16, True, 4, dtype, 5) for m in (1, 64, 301) for dtype in ("float16", "float32")]
    found += [("gemm", 301, 37, 48, 16, False, 4, "float32", 5)]

    # Activations: m, k, group_size, dtype, two_level, act_bits, rotate, smooth, rank, planes. Every tile, and with it
    # another of the many combinations of the rest.
    rest = itertools.cycle(itertools.product(((True, 4), (True, 8), (False, 4)), (True, True, False), (True, False)))
    seen = set()
    for k, group, dtype in itertools.product((2048, 4096, 8192), GROUPS, DTYPES):
        tile = json.dumps(svdq_quantize.config(k, k, 32, group, getattr(torch, dtype), target))
        if tile not in seen or (k, group) == (4096, 64):
            seen.add(tile)
            (two_level, act_bits), rotate, smooth = next(rest)
            found.append(("quantize", 1024, k, group, dtype, two_level, act_bits, rotate, smooth, 32, True))
    found += [("quantize", 1024, 4096, 64, dtype, True, 4, True, True, 128, False) for dtype in DTYPES]
    found += [("quantize", 1, 77, group, dtype, True, 4, True, True, 5, True) for group in (16, 64) for dtype in DTYPES]
    return list(dict.fromkeys(found))


DTYPES = ["bfloat16", "float16", "float32"]
ALL = [(target, case) for target in TARGETS for case in cases(target)]


def name(target: str, case: tuple) -> str:
    return "-".join(map(str, (target, *case)))


# ---- the second process: launches caught and compiled ---------------------------------------------------------------


class Driver:
    """What Triton asks of a GPU before it compiles."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return str(self.target)

    def get_current_stream(self, device):
        return 0


def meta(*shape, dtype):
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return torch.empty(*shape, dtype=dtype, device="meta")


def launch_w8(module, m, n, k, dtype):
    run = getattr(module, f"{module.__name__.rsplit('.', 1)[-1]}_linear")
    run(meta(m, k, dtype=dtype), meta(n, k, dtype="int8"), meta(n, dtype="float32"), meta(n, dtype=dtype))


def launch_gemm(m, n, padded, group_size, two_level, act_bits, dtype, rank):
    groups = padded // group_size
    act_groups = 1 if two_level or act_bits == 8 else groups
    svdq_gemm.gemm(
        meta(m, padded, dtype="int8"),
        meta(m, act_groups, dtype="float32"),
        meta(m, rank, dtype="float32"),
        meta(n, padded // 2, dtype="uint8"),
        meta(n, dtype="float32") if two_level else meta(n, groups, dtype="float32"),
        meta(n, groups, dtype="uint8") if two_level else None,
        meta(n, rank, dtype="bfloat16" if dtype == "float32" and rank == 32 else dtype) if rank else None,
        meta(n, dtype=dtype),
        group_size,
        getattr(torch, dtype),
    )


def launch_quantize(m, k, group_size, dtype, two_level, act_bits, rotate, smooth, rank, planes):
    x, down = meta(m, k, dtype=dtype), meta(k, rank, dtype=dtype)
    smooth_factor = meta(k, dtype="float32") if smooth else None
    padded = -(-k // group_size) * group_size
    svdq_quantize.quantize(x, smooth_factor, down, padded, group_size, rotate, two_level, act_bits, planes)


LAUNCHES = {
    "w8a16": (w8a16, w8a16.w8a16_kernel, lambda *args: launch_w8(w8a16, *args)),
    "w8a32": (w8a32, w8a32.w8a32_kernel, lambda *args: launch_w8(w8a32, *args)),
    "gemm": (svdq_gemm, svdq_gemm.svdq_gemm_kernel, launch_gemm),
    "quantize": (svdq_quantize, svdq_quantize.svdq_quantize_kernel, launch_quantize),
}


@contextlib.contextmanager
def caught(module, kernel, target: GPUTarget):
    """Within, the wrapper of `kernel` believes in `target`, and its launches end in the list that this yields."""
    launches, target_of = [], module.target_of

    def run(*args, grid, warmup, **options):
        launches.append((args, grid, options))

    module.target_of, kernel.run = (lambda x: target), run
    try:
        yield launches
    finally:
        module.target_of = target_of
        del kernel.run


def compile_case(target_name: str, case: tuple) -> dict:
    target = TARGETS[target_name]
    module, kernel, launch = LAUNCHES[case[0]]
    with caught(module, kernel, target) as launches:
        launch(*case[1:])
    ((args, grid, options),) = launches
    triton.runtime.driver.set_active(Driver(target))
    compiled = kernel.warmup(*args, grid=grid, **options)
    assembly = compiled.asm["ptx" if target.backend == "cuda" else "amdgcn"]
    mma = r"(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma\.)\S+" if target.backend == "cuda" else r"v_mfma_\w+"
    result = {
        "options": {key: str(value) for key, value in options.items()},
        "shared": compiled.metadata.shared,
        "tensor_memory": getattr(compiled.metadata, "tmem_size", 0) or 0,
        "mma": sorted(set(re.findall(mma, assembly))),
        "weight_in_registers": bool(re.search(r"warp_group_dot.*dot_op<\{opIdx = 0", compiled.asm["ttgir"])),
    }
    return result | (usage_hip(assembly) if target.backend == "hip" else usage_cuda(compiled.asm["cubin"]))


def usage_cuda(cubin: bytes) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+).*? LOCAL:(\d+)", text).groups())
    return {"registers": registers, "spilled": stack + local}


def usage_hip(assembly: str) -> dict:
    keys = ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    registers, spilled, scratch = (int(re.search(rf"\.{key}:\s+(\d+)", assembly)[1]) for key in keys)
    return {"registers": registers, "spilled": spilled + scratch}


if __name__ == "__main__":
    part, parts = map(int, sys.argv[1:])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the compilers print must not mix with the answers
    for target_name, case in ALL[part::parts]:
        try:
            outcome = compile_case(target_name, case)
        except Exception as error:
            outcome = {"error": f"{type(error).__name__}: {error}"[-2000:]}
        print(json.dumps([name(target_name, case), outcome]), file=answers, flush=True)
    sys.exit()


# ---- the claims -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results() -> dict[str, dict]:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": "0"}

    def half(part: int) -> list[str]:
        command = [sys.executable, __file__, str(part), "2"]
        return subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env).stdout.splitlines()

    with ThreadPoolExecutor(2) as pool:
        return dict(json.loads(line) for lines in pool.map(half, range(2)) for line in lines)


def wanted_mma(target: str, kernel: str, m: int, dtype: str) -> str:
    """The instruction of the main product, as a pattern."""
    integer = kernel == "gemm"
    kind = "bf16" if kernel == "w8a32" or dtype == "bfloat16" else "f16"
    wide = m > 16  # few tokens are a narrow tile of two warps: too little for the instructions of a warp group
    if target == "gfx942":
        return r"v_mfma_i32_\w+i8" if integer else rf"v_mfma_f32_\w+_{kind}"
    if target == "sm_90" and wide:
        return r"wgmma\S+\.s32\.s8\.s8" if integer else rf"wgmma\S+\.f32\.{kind}\.{kind}"
    if target == "sm_100" and wide and not integer:  # its tensor memory has no int8
        return r"tcgen05\.mma\S+kind::f16"
    return r"mma\.sync\S+\.s32\.s8\.s8\.s32" if integer else rf"mma\.sync\S+\.f32\.{kind}\.{kind}\.f32"


@pytest.mark.parametrize("target, case", ALL, ids=[name(*pair) for pair in ALL])
def test_a_launch_compiles_without_spills_to_the_instruction_that_was_meant(results, target, case):
    result = results.get(name(target, case), {"error": "no answer: the compiler died, on this case or one before it"})
    assert "error" not in result, result["error"]
    assert result["spilled"] == 0, result
    assert result["shared"] <= SHARED_BYTES[target], result
    assert result["tensor_memory"] <= TENSOR_MEMORY_COLUMNS, result
    kernel, m = case[:2]
    if kernel != "quantize":
        pattern = wanted_mma(target, kernel, m, case[7] if kernel == "gemm" else case[4])
        assert any(re.search(pattern, mma) for mma in result["mma"]), (pattern, result["mma"])
    else:
        assert result["mma"], "the projection goes through tensor cores"
        assert not any("tcgen05" in mma for mma in result["mma"]), result["mma"]


@pytest.mark.parametrize("case", [case for case in cases("sm_90") if case[0] != "quantize" and case[1] == 1024])
def test_on_hopper_the_weight_goes_into_the_product_from_registers(results, case):
    assert results[name("sm_90", case)]["weight_in_registers"]


@pytest.mark.parametrize("target", TARGETS)
def test_every_tile_that_can_be_chosen_is_compiled(results, target):
    tokens, features = range(1, 200, 5), (16, 48, 77, 1024, 2048, 2064, 4096, 4112, 5000, 8192, 20480)
    dtypes = [getattr(torch, dtype) for dtype in DTYPES]
    gpu = TARGETS[target]
    choices = {
        "w8a16": [w8a16.config(m, k, gpu) for m in tokens for k in features],
        "w8a32": [w8a32.config(m, k, gpu) for m in tokens for k in features],
        "gemm": [
            svdq_gemm.config(m, half, group, two_level, dtype, gpu)
            for m, half, group, two_level, dtype in itertools.product(tokens, (24, 2048), GROUPS, (True, False), dtypes)
            if 2 * half % group == 0
        ],
        "quantize": [
            svdq_quantize.config(k, -(-k // group) * group, rank, group, dtype, gpu)
            for k, rank, group, dtype in itertools.product(features, (0, 5, 32), GROUPS, dtypes)
        ],
    }
    for kernel, tiles in choices.items():
        compiled = [results[name(target, case)].get("options", {}) for case in cases(target) if case[0] == kernel]
        for tile in {json.dumps(tile): tile for tile in tiles}.values():
            wanted = {key: str(value) for key, value in tile.items()}.items()
            assert any(wanted <= options.items() for options in compiled), (kernel, tile)
