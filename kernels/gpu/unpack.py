"""int4 and ternary codes out of their bytes, four or two at a time.

Each function says the same thing twice: in plain Triton, for the interpreter and AMD, and with ASM in NVIDIA's
instructions, which work on a whole register. The compiler takes the plain form apart into single bytes: that costs
three times as much, and in a decode kernel unpacking is most of the work.
"""

import triton
import triton.language as tl


@triton.jit
def folded_int8(packed, integer, zero, ASM: tl.constexpr):
    """(low, high): the codes of uint8 `packed` times the int32 `integer` 1..16 of their group, less the int32 `zero`
    0..128 of it, int8. zero = integer * (zero point + 8): codes are counted from the least, -8, as 0.

    Offset by 128 that is one multiply-add of bytes without signs, whose sum fits a byte; the exclusive or takes the 128
    off again. ASM takes integer and zero of the first of every four bytes for all four: they must be neighbours in a
    row, which they are wherever a row of bytes goes into an int8 product or comes from an aligned load.
    """
    if ASM:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 low, high, offset;
            mad.lo.u32 offset, $7, 0xFEFEFEFF, 0x80808080;  // 128 - zero, in every byte
            lop3.b32 low, $2, 0x0F0F0F0F, 0x08080808, 0x6A; // (packed & 0x0F) ^ 8: the code plus 8
            shr.b32 high, $2, 4;
            lop3.b32 high, high, 0x0F0F0F0F, 0x08080808, 0x6A;
            mad.lo.u32 low, low, $3, offset;
            mad.lo.u32 high, high, $3, offset;
            xor.b32 $0, low, 0x80808080;
            xor.b32 $1, high, 0x80808080;
            }
            """,
            "=r,=r,r,r,r,r,r,r,r,r,r",
            [packed, integer, zero],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    packed = packed.to(tl.int32)
    low = (packed & 0xF) ^ 8
    high = (packed >> 4) ^ 8
    offset = 128 - zero
    return ((low * integer + offset) ^ 0x80).to(tl.int8), ((high * integer + offset) ^ 0x80).to(tl.int8)


@triton.jit
def int8_times_16(packed, ASM: tl.constexpr):
    """(low, high): 16 times the codes of uint8 `packed`, int8. A nibble that is moved up has its sign in place."""
    if ASM:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 low;
            shl.b32 low, $2, 4;
            and.b32 $0, low, 0xF0F0F0F0;
            and.b32 $1, $2, 0xF0F0F0F0;
            }
            """,
            "=r,=r,r",
            [packed],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    return (packed << 4).to(tl.int8, bitcast=True), (packed & 0xF0).to(tl.int8, bitcast=True)


@triton.jit
def quarters_of_bytes(packed, ASM: tl.constexpr):
    """The four numbers 0..3 of two bits in every uint8 of `packed`, lowest first: four tensors, int8."""
    if ASM:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 q1, q2, q3;
            and.b32 $0, $4, 0x03030303;
            shr.b32 q1, $4, 2;
            and.b32 $1, q1, 0x03030303;
            shr.b32 q2, $4, 4;
            and.b32 $2, q2, 0x03030303;
            shr.b32 q3, $4, 6;
            and.b32 $3, q3, 0x03030303;
            }
            """,
            "=&r,=&r,=&r,=&r,r",
            [packed],
            dtype=(tl.int8, tl.int8, tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    return (
        (packed & 3).to(tl.int8),
        ((packed >> 2) & 3).to(tl.int8),
        ((packed >> 4) & 3).to(tl.int8),
        ((packed >> 6) & 3).to(tl.int8),
    )


@triton.jit
def float16_of_int8(codes, ASM: tl.constexpr):
    """int8 -> float16. A byte in the mantissa of 1024 adds to it: code + 128 + 1024. (bfloat16 has no room for it, and
    what the compiler does there is as short.)"""
    if ASM:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 bytes, low, high, offset;
            mov.b32 offset, 0xE480E480;                 // -1152
            xor.b32 bytes, $2, 0x80808080;              // the code plus 128
            prmt.b32 low, bytes, 0x64646464, 0x4140;
            prmt.b32 high, bytes, 0x64646464, 0x4342;
            add.f16x2 $0, low, offset;
            add.f16x2 $1, high, offset;
            }
            """,
            "=r,=r,r",
            [codes],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )
    return codes.to(tl.float16)


@triton.jit
def halves_of_words(words, offset, ASM: tl.constexpr):
    """The four codes of every int16 of `words`, lowest nibble first, less their zero point: four tensors.

    A nibble in the mantissa of 128 (bfloat16) or 1024 (float16) adds to it, exactly: code + 8 + 128. `offset` is what
    brings it back, -(136 + zero point) or -(1032 + zero point), in the type of the result.
    """
    if not ASM:
        q0, q1, q2, q3 = _halves(words, offset)
    elif offset.dtype == tl.bfloat16:
        q0, q1, q2, q3 = _bfloat16_halves(words, offset)
    else:
        q0, q1, q2, q3 = _float16_halves(words, offset)
    return q0, q1, q2, q3


@triton.jit
def _bfloat16_halves(words, offset):
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 q0, q1, q2, q3, one;
        mov.b32 one, 0x3F803F80;
        shr.b32 q1, $4, 4;
        shr.b32 q2, $4, 8;
        shr.b32 q3, $4, 12;
        lop3.b32 q0, $4, 0x000F000F, 0x43084308, 0x6A;  // (word & 0xF) ^ 8, and 128 above it
        lop3.b32 q1, q1, 0x000F000F, 0x43084308, 0x6A;
        lop3.b32 q2, q2, 0x000F000F, 0x43084308, 0x6A;
        lop3.b32 q3, q3, 0x000F000F, 0x43084308, 0x6A;
        fma.rn.bf16x2 $0, q0, one, $5;
        fma.rn.bf16x2 $1, q1, one, $5;
        fma.rn.bf16x2 $2, q2, one, $5;
        fma.rn.bf16x2 $3, q3, one, $5;
        }
        """,
        "=r,=r,=r,=r,r,r",
        [words, offset],
        dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def _float16_halves(words, offset):
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 q0, q1, q2, q3;
        shr.b32 q1, $4, 4;
        shr.b32 q2, $4, 8;
        shr.b32 q3, $4, 12;
        lop3.b32 q0, $4, 0x000F000F, 0x64086408, 0x6A;
        lop3.b32 q1, q1, 0x000F000F, 0x64086408, 0x6A;
        lop3.b32 q2, q2, 0x000F000F, 0x64086408, 0x6A;
        lop3.b32 q3, q3, 0x000F000F, 0x64086408, 0x6A;
        add.f16x2 $0, q0, $5;
        add.f16x2 $1, q1, $5;
        add.f16x2 $2, q2, $5;
        add.f16x2 $3, q3, $5;
        }
        """,
        "=r,=r,=r,=r,r,r",
        [words, offset],
        dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def _halves(words, offset):
    dtype: tl.constexpr = offset.dtype
    zero = -offset.to(tl.float32) - (136.0 if dtype == tl.bfloat16 else 1032.0)
    words = words.to(tl.int32)
    q0 = ((((words & 0xF) ^ 8) - 8).to(tl.float32) - zero).to(dtype)
    q1 = (((((words >> 4) & 0xF) ^ 8) - 8).to(tl.float32) - zero).to(dtype)
    q2 = (((((words >> 8) & 0xF) ^ 8) - 8).to(tl.float32) - zero).to(dtype)
    q3 = (((((words >> 12) & 0xF) ^ 8) - 8).to(tl.float32) - zero).to(dtype)
    return q0, q1, q2, q3
