"""How many instructions the main loop of each 4096 x 4096 GPU kernel takes for a weight, by the compiler for sm_90.

    python docs/tools/instructions.py        # needs Triton, no GPU; about a minute

In brackets: with the codes unpacked by Triton's own operations in place of assembly, where a kernel has both.
"""

import torch

from qgraft.kernels.gpu import ahead, bitnet, svdq_gemm, w4a16, w8a8, w8a16

N = K = 4096
HALF = torch.bfloat16


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def x(m: int) -> torch.Tensor:
    return empty(m, K, dtype=HALF)


def grouped(m: int, group: int, zero_point: bool) -> None:
    groups = K // group
    scale, zeros = empty(N, groups, dtype=HALF), empty(N, groups, dtype=torch.int8) if zero_point else None
    qweight = empty(N, K // 2, dtype=torch.uint8)
    w4a16.w4a16_linear(x(m), qweight, scale, zeros, None, None, None, None, group, False)


def svdq(m: int, two_level: bool) -> None:
    groups = K // 64
    scale = empty(N) if two_level else empty(N, groups)
    integer = empty(N, groups, dtype=torch.uint8) if two_level else None
    codes, qweight = empty(m, K, dtype=torch.int8), empty(N, K // 2, dtype=torch.uint8)
    lora, up, bias = empty(m, 32), empty(N, 32, dtype=HALF), empty(N, dtype=HALF)
    svdq_gemm.gemm(codes, empty(m, 1), lora, qweight, scale, integer, up, bias, 64, HALF)


def int8() -> tuple[torch.Tensor, torch.Tensor]:
    return empty(N, K, dtype=torch.int8), empty(N)


KERNELS = {
    "W8A8, dynamic": lambda m: w8a8.w8a8_linear(x(m), *int8(), None, None, None, None),
    "BitNet": lambda m: bitnet.bitnet_linear(x(m), empty(N, K // 4, dtype=torch.uint8), empty(N), None),
    "W4A4 and W4A8 SVD, two-level scales": lambda m: svdq(m, True),
    "W4A8 SVD, a float for each group": lambda m: svdq(m, False),
    "W4A16, group 64": lambda m: grouped(m, 64, False),
    "W4A16, group 64, zero points": lambda m: grouped(m, 64, True),
    "W4A16, one scale a row": lambda m: grouped(m, K, False),
    "W8A16": lambda m: w8a16.w8a16_linear(x(m), *int8(), None),
}


def cost(kernel: str, tokens: int, asm: bool = True) -> float | None:
    """None: this kernel has no assembly to leave out."""
    with ahead.launches("sm_90", table="H200") as caught:
        KERNELS[kernel](tokens)
    launch = caught[-1]  # the product; before it the activations are quantized
    if not asm:
        if "ASM" not in launch.options:
            return None
        launch = launch._replace(options=launch.options | {"ASM": False})
    return ahead.instructions_per_weight(ahead.built(launch, "sm_90"))


if __name__ == "__main__":
    print(f"{'instructions a weight':36}" + "".join(f"{f'{m} tokens':>14}" for m in (8, 16, 512)))
    for kernel in KERNELS:
        cells = []
        for m in (8, 16, 512):
            hand, plain = cost(kernel, m), cost(kernel, m, asm=False)
            cells.append(f"{hand:.1f}" + ("" if plain in (None, hand) else f" ({plain:.1f})"))
        print(f"{kernel:36}" + "".join(f"{cell:>14}" for cell in cells), flush=True)
