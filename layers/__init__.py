"""What takes the place of an `nn.Linear`. Importing this registers every scheme."""

from .base import SCHEMES, QuantLinear, Scheme, Unsuitable, register, storage_bytes
from .bitlinear import BitLinear, BitNetLinear, BitNetScheme
from .factorized import FactorizedLinear, FactorizedScheme, FactorizedW8Linear
from .stats import Stats
from .svdq import SVDQScheme, SVDQW4A4Linear, SVDQW4A8Linear
from .w4a16 import W4A16Linear, W4A16Scheme
from .w8a8 import W8A8Linear, W8A8Scheme, W8A8StaticLinear, W8A8StaticScheme
from .w8a16 import W8A16Linear, W8A16Scheme
from .w8a32 import W8A32Linear, W8A32Scheme

__all__ = [
    "SCHEMES",
    "BitLinear",
    "BitNetLinear",
    "BitNetScheme",
    "FactorizedLinear",
    "FactorizedScheme",
    "FactorizedW8Linear",
    "QuantLinear",
    "SVDQScheme",
    "SVDQW4A4Linear",
    "SVDQW4A8Linear",
    "Scheme",
    "Stats",
    "Unsuitable",
    "W4A16Linear",
    "W4A16Scheme",
    "W8A8Linear",
    "W8A8Scheme",
    "W8A8StaticLinear",
    "W8A8StaticScheme",
    "W8A16Linear",
    "W8A16Scheme",
    "W8A32Linear",
    "W8A32Scheme",
    "register",
    "storage_bytes",
]
