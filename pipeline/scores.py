"""What each pruning method computes. Pure math: no lightning, no accelerate, no torch.distributed.

Shapes: O = out_features, I = in_features, N = tokens.
"""

import torch
from torch import Tensor


def square_sum(input_NI: Tensor) -> Tensor:
    """Sum over tokens of the squared inputs, (I,) in float64: fp32 within the batch, exact enough across batches that
    neither their order nor the number of ranks changes a mask."""
    input_NI = input_NI.float()
    return torch.einsum("ni,ni->i", input_NI, input_NI).double()


def wanda(weight_OI: Tensor, square_sum_I: Tensor) -> Tensor:
    """|W_ij| * ||x_j||_2 (Sun et al. 2023, "A Simple and Effective Pruning Approach for LLMs", eq. 1)."""
    return weight_OI.float().abs() * square_sum_I.sqrt().float()


def magnitude(weight_OI: Tensor) -> Tensor:
    return weight_OI.float().abs()


def relative_error(input_NI: Tensor, dense_OI: Tensor, pruned_OI: Tensor) -> float:
    """||X W^T - X W'^T|| / ||X W^T||, Frobenius."""
    dense_NO = input_NI.float() @ dense_OI.float().T
    error_NO = dense_NO - input_NI.float() @ pruned_OI.float().T
    return float(error_NO.norm() / dense_NO.norm().clamp_min(torch.finfo(torch.float32).tiny))
