"""Compile the kernels for a GPU that need not be here, and look at what came out.

    with launches("sm_90") as caught:             # on meta tensors; nothing runs
        w8a16.w8a16_linear(x, qweight, scale, None)
    for launch in caught:
        print(built(launch, "sm_90"))

Registers, spills and shared memory come from the compiler; the cost of the main loop is counted in its machine code.
"""

import contextlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator

import triton
from triton.backends.compiler import GPUTarget

from . import common
from .common import Launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")


class _Driver:
    """What Triton asks of a GPU before it compiles."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)

    def get_current_stream(self, device: str) -> int:
        return 0


@contextlib.contextmanager
def launches(target: str, table: str | None = None) -> Iterator[list[Launch]]:
    """Within, every wrapper believes in that GPU (and in the shipped table of that name), and its launches end in the
    list that this yields instead of on a device."""
    common.pretended = common.Pretended(TARGETS[target], table, [])
    try:
        yield common.pretended.launches
    finally:
        common.pretended = None


def compiled(launch: Launch, target: str) -> triton.compiler.CompiledKernel:
    """What the compiler makes of a launch: `asm` holds each of its stages, such as "ttgir", "ptx" and "cubin"."""
    before = getattr(triton.runtime.driver, "_active", None)
    triton.runtime.driver.set_active(_Driver(TARGETS[target]))
    try:
        return launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.options)
    finally:
        triton.runtime.driver.set_active(before)


def disassembled(cubin: bytes, what: str = "-sass") -> str:
    """The machine code in a cubin as text, or what else cuobjdump can tell of it, such as "-res-usage"."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([CUOBJDUMP, what, file.name], capture_output=True, text=True, check=True).stdout


def built(launch: Launch, target: str, disassemble: bool = True) -> dict:
    """Compile a launch. Returns

    registers, spilled   of a thread; bytes
    shared               bytes of a program
    tensor_memory        columns (data-center Blackwell)
    mma                  the tensor-core instructions in it, sorted
    machine_mma          what became of them in the machine code (CUDA, if disassembled), sorted
    from_registers       whether a product takes its first operand from registers (Hopper's wgmma)
    packed_layouts       the layouts of tensors that packed assembly works on
    loop                 instructions of the main loop's body, a warp (if disassembled, which takes as long as to
                         compile); None without CUDA, or without such a loop
    """
    gpu, made = TARGETS[target], compiled(launch, target)
    assembly = made.asm["ptx" if gpu.backend == "cuda" else "amdgcn"]
    mma = r"(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma\.)\S+" if gpu.backend == "cuda" else r"v_mfma_\w+"
    ttgir = made.asm["ttgir"]
    result = {
        "kernel": launch.kernel.__name__,
        "options": {key: str(value) for key, value in launch.options.items()},
        "shared": made.metadata.shared,
        "tensor_memory": getattr(made.metadata, "tmem_size", 0) or 0,
        "mma": sorted(set(re.findall(mma, assembly))),
        "from_registers": bool(re.search(r"warp_group_dot.*dot_op<\{opIdx = 0", ttgir)),
        "packed_layouts": _packed_layouts(ttgir),
    }
    return result | (_usage_hip(assembly) if gpu.backend == "hip" else _usage_cuda(made.asm["cubin"], disassemble))


def _packed_layouts(ttgir: str) -> list[str]:
    aliases = dict(re.findall(r"^(#\w+) = (#.*)$", ttgir, re.MULTILINE))
    found = set()
    for types in re.findall(r"elementwise_inline_asm.*?: ?(.*)->", ttgir):
        for layout in re.findall(r"tensor<[^,]*, ([^>]*(?:<\{[^}]*\}>)?)>", types):
            for alias, text in aliases.items():
                layout = re.sub(rf"{alias}\b", text, layout)
            found.add(layout)
    return sorted(found)


def _usage_cuda(cubin: bytes, disassemble: bool) -> dict:
    usage = disassembled(cubin, "-res-usage")
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+).*? LOCAL:(\d+)", usage).groups())
    result = {"registers": registers, "spilled": stack + local}
    if disassemble:
        code = disassembled(cubin)
        result |= {"loop": _main_loop(code), "machine_mma": sorted(set(re.findall(r"\b\w*MMA\b", code)))}
    return result


def _main_loop(sass: str) -> int | None:
    """The instructions of the longest loop with a tensor-core instruction: between a backward branch and its goal."""
    code = [(int(address, 16), text) for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)]
    bodies = []
    for address, text in code:
        branch = re.search(r"\bBRA\b.*0x([0-9a-f]+)", text)
        if branch and (start := int(branch[1], 16)) < address:
            bodies.append([text for at, text in code if start <= at <= address])
    return max((len(body) for body in bodies if any("MMA" in text for text in body)), default=None)


def instructions_per_weight(result: dict) -> float:
    """What the main loop of one of the GEMM kernels, as `built`, costs a thread for each weight that it takes."""
    options, codes = result["options"], {"BLOCK_K": 1, "BLOCK_B": 2, "BLOCK_W": 4, "BLOCK_Q": 4}
    weights = next(int(options[block]) * codes[block] for block in codes if block in options) * int(options["BLOCK_N"])
    return result["loop"] * 32 * int(options["num_warps"]) / weights


def _usage_hip(assembly: str) -> dict:
    keys = ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    registers, spilled, scratch = (int(re.search(rf"\.{key}:\s+(\d+)", assembly)[1]) for key in keys)
    return {"registers": registers, "spilled": spilled + scratch, "loop": None}
