"""What the demo promises, checked against what it measured."""

from dataclasses import asdict, dataclass
from typing import Any

# (model, recipe, float model to compare with, largest ratio of perplexities)
PERPLEXITY = (
    ("SmolLM2-135M", "w8a32", "float32", 1.005),
    ("SmolLM2-135M", "w8a16", "bfloat16", 1.01),
    ("SmolLM2-135M", "w4a8_svd", "float32", 1.2),
    ("SmolLM2-135M", "w4a4_svd", "float32", 1.35),
)
# (model, recipe, largest 1 - cosine to the float32 model)
COSINE = (
    ("MiniLM-L6-v2", "w8a32", 0.001),
    ("MiniLM-L6-v2", "w8a16", 0.001),
    ("MiniLM-L6-v2", "w4a8_svd", 0.03),
    ("MiniLM-L6-v2", "w4a4_svd", 0.05),
)


@dataclass(frozen=True)
class Claim:
    """A sentence, and the number that makes it true or not."""

    text: str
    measured: str
    ok: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{'ok' if self.ok else 'FAILED':6}  {self.text}: {self.measured}"


def check(models: dict[str, dict[str, Any]]) -> list[Claim]:
    """Every claim about the models that were measured; `models` is that part of results.json."""
    rows = {(model, row["name"]): row for model, result in models.items() for row in result["rows"]}
    claims = []
    for model, recipe, base, limit in PERPLEXITY:
        if model in models:
            ratio = rows[model, recipe]["quality"] / rows[model, base]["quality"]
            text = f"{model} {recipe}: perplexity at most {limit:g} x that of {base}"
            claims.append(Claim(text, f"{ratio:.4f} x", ratio <= limit))
    for model, recipe, limit in COSINE:
        if model in models:
            value = rows[model, recipe]["quality"]
            text = f"{model} {recipe}: 1 - cosine to float32 at most {limit:g}"
            claims.append(Claim(text, f"{value:.5f}", value <= limit))
    for model, result in models.items():
        quantized = [row for row in result["rows"] if row["recipe"]]
        broken = [row["name"] for row in quantized if not row["reload_equal"]]
        text = f"{model}: saved, loaded into a fresh model, every output is the same to the last bit"
        measured = f"not {', '.join(broken)}" if broken else f"{len(quantized)} of {len(quantized)} recipes"
        claims.append(Claim(text, measured, not broken))
    return claims
