"""Cholesky factors in the place of their matrices: of wide layers these are larger than all the rest."""

import torch
from torch import Tensor


def factor_in_place(matrix: Tensor, upper: bool = False) -> bool:
    """Put the factor of a symmetric matrix (K, K) in its place; whether there is one, else it holds nothing of use."""
    failed = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(matrix, upper=upper, out=(matrix, failed))
    return not failed
