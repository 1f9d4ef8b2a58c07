"""What takes the place of an `nn.Linear`. Importing this registers every scheme."""

from .base import SCHEMES, QuantLinear, Scheme, register, storage_bytes
from .stats import Stats
from .svdq import SVDQScheme, SVDQW4A4Linear
from .w8a16 import W8A16Linear, W8A16Scheme
from .w8a32 import W8A32Linear, W8A32Scheme

__all__ = [
    "SCHEMES",
    "QuantLinear",
    "SVDQScheme",
    "SVDQW4A4Linear",
    "Scheme",
    "Stats",
    "W8A16Linear",
    "W8A16Scheme",
    "W8A32Linear",
    "W8A32Scheme",
    "register",
    "storage_bytes",
]
