"""Weight shapes by name: the sets that kernels are usually compared on, all (N, K) as out x in features."""

Shape = tuple[int, int]

SETS: dict[str, tuple[Shape, ...]] = {
    "squares": ((1024, 1024), (2048, 2048), (4096, 4096), (8192, 8192)),
    # q and o, k and v, gate and up, down of Llama-3 8B.
    "llama-8b": ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)),
    # Attention, the two layers of the MLP, and the fused one of the single blocks of FLUX.
    "flux": ((3072, 3072), (3072, 12288), (12288, 3072), (15360, 3072)),
}


def parse(text: str) -> tuple[Shape, ...]:
    """The shapes that "4096x4096" or the name of a set stands for. Raises ValueError, in words for the user."""
    if text in SETS:
        return SETS[text]
    try:
        n, k = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise ValueError(f"'{text}' is no shape: write NxK, out x in features, or {', '.join(SETS)}") from None
    if min(n, k) < 1:
        raise ValueError(f"'{text}': both sides must be at least 1")
    return ((n, k),)
