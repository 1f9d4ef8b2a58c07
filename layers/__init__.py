"""What takes the place of an `nn.Linear`, or of an `nn.Embedding`. Importing this registers every scheme."""

from .base import SCHEMES, QuantLayer, QuantLinear, Scheme, Unsuitable, register, storage_bytes, tie
from .bitlinear import BitLinear, BitNetLinear, BitNetScheme
from .embedding import EMBEDDINGS, EmbeddingW4, EmbeddingW8, QuantEmbedding
from .experts import Experts, is_fused, why_not_split
from .factorized import FactorizedLinear, FactorizedScheme, FactorizedW8Linear
from .grouped import W4GroupLinear, W4GroupScheme, W8GroupLinear, W8GroupScheme
from .stats import Stats
from .svdq import SVDQW4A4Linear, SVDQW4A8Linear
from .svdq_scheme import SVDQScheme, SVDQW4A4Scheme
from .w4a16 import W4A16Linear, W4A16Scheme
from .w8a8 import W8A8Linear, W8A8Scheme, W8A8StaticLinear, W8A8StaticScheme
from .w8a16 import W8A16Linear, W8A16Scheme
from .w8a32 import W8A32Linear, W8A32Scheme

__all__ = [
    "EMBEDDINGS",
    "SCHEMES",
    "BitLinear",
    "BitNetLinear",
    "BitNetScheme",
    "EmbeddingW4",
    "EmbeddingW8",
    "Experts",
    "FactorizedLinear",
    "FactorizedScheme",
    "FactorizedW8Linear",
    "QuantEmbedding",
    "QuantLayer",
    "QuantLinear",
    "SVDQScheme",
    "SVDQW4A4Linear",
    "SVDQW4A4Scheme",
    "SVDQW4A8Linear",
    "Scheme",
    "Stats",
    "Unsuitable",
    "W4A16Linear",
    "W4A16Scheme",
    "W4GroupLinear",
    "W4GroupScheme",
    "W8A8Linear",
    "W8A8Scheme",
    "W8A8StaticLinear",
    "W8A8StaticScheme",
    "W8A16Linear",
    "W8A16Scheme",
    "W8A32Linear",
    "W8A32Scheme",
    "W8GroupLinear",
    "W8GroupScheme",
    "is_fused",
    "register",
    "storage_bytes",
    "tie",
    "why_not_split",
]
