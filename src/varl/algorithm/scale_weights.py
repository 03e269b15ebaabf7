"""Per-Action Normalization Weighting: how much of the loss each step holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from varl.transfer import sent

__all__ = ["Count", "scale_weights", "step_shares", "token_weights"]

Count = Literal["grid", "masked"]


def scale_weights(
    counts: Sequence[int],
    alpha: float = 0.6,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """k_t = 1 / n_t^alpha, the weight of one token of step t (Eq. 9).

    Args:
        counts: tokens n_t = h_t w_t of each step being trained, length T, each at least 1.
        alpha: 0 leaves every token equal, 1 every step; the paper's best is 0.6 to 0.8. Any finite number.

    Returns:
        k_T: [T], positive.

    Raises:
        ValueError: if there is no step, a count is below 1, or alpha is not finite.
    """
    counts_T = _counts(counts, alpha)
    return counts_T.pow(-alpha).to(device=device, dtype=dtype)


def step_shares(counts: Sequence[int], alpha: float = 0.6) -> Tensor:
    """The share of the loss weight that each step holds, k_t n_t / sum_t k_t n_t.

    Args:
        counts, alpha: as for ``scale_weights``.

    Returns:
        [T] float64, sums to 1.

    Raises:
        ValueError: as ``scale_weights``.
    """
    weight_T = _counts(counts, alpha).pow(1 - alpha)
    return weight_T / weight_T.sum()


def token_weights(
    counts: Sequence[int],
    alpha: float = 0.6,
    *,
    rescale: bool = True,
    mask_BL: Tensor | None = None,
    count: Count = "grid",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """The weight w of every trained token; a sample's loss is sum_L w (M pg + beta kl).

    A token of step t weighs w = k_t / sum_t k_t n_t, k_t = 1 / n_t^alpha, with the sum over the steps being
    trained, so that alpha moves weight between steps but not the size of the loss: the weights of all tokens
    sum to 1. alpha = 0 is the plain token mean, alpha = 1 the mean of per-step means. (PANW, Eq. 9 and
    method.md section 5.)

    What n_t counts under a mask:

    * ``grid``: all h_t w_t tokens of the step. One weight for the whole batch, [L]. A mask then lowers the
      weight of the steps it covers least; masks propagate fine to coarse and so cover fine steps least, which
      moves weight to the coarse ones (the paper's "cross-scale balance").
    * ``masked``: the mask's sum over the step, per sample, in k_t and in the normaliser alike: the policy
      term of every sample has total weight 1 and PANW's balance holds among masked tokens (alpha = 1: the
      mean over the steps of the mean over their masked tokens). A step without a masked token, and a sample
      without any, weighs 0. The KL term is usually not masked, so give it the ``grid`` weights:
      ``LossInput.kl_weight_BL``.

    Args:
        counts: tokens of each step being trained, length T, sum L.
        alpha: as for ``scale_weights``.
        rescale: False leaves out the normaliser: w = k_t.
        mask_BL: [B, L] in [0, 1], the mask of the trained tokens; needed by ``masked``, unused by ``grid``.
        count: see above.
        dtype: of the result. device: of the result; with ``masked`` that of the mask by default.

    Returns:
        w_L: [L] for ``grid``; w_BL: [B, L] for ``masked``. Not negative.

    Raises:
        ValueError: as ``scale_weights``; if ``masked`` has no mask or one that is not [B, L]; if ``count`` is
            unknown.
    """
    counts_T = _counts(counts, alpha)
    if count not in get_args(Count):
        raise ValueError(f"count must be one of {', '.join(get_args(Count))}, got {count!r}")
    length = sum(counts)
    step_L = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(list(counts)))
    if count == "grid":
        k_T = counts_T.pow(-alpha)
        norm = (k_T * counts_T).sum() if rescale else 1.0
        w_L = (k_T / norm)[step_L].to(dtype)
        return w_L if device is None else sent(w_L, torch.device(device))
    if mask_BL is None or mask_BL.ndim != 2 or mask_BL.shape[1] != length:
        got = "none" if mask_BL is None else f"shape {tuple(mask_BL.shape)}"
        raise ValueError(
            f"count='masked' needs mask_BL of shape [batch, {length}], one column a trained token, got {got}"
        )
    step_L = sent(step_L, mask_BL.device)
    masked_BT = torch.zeros(mask_BL.shape[0], len(counts), device=mask_BL.device, dtype=torch.float32)
    masked_BT.index_add_(1, step_L, mask_BL.detach().float())
    k_BT = torch.where(masked_BT > 0, masked_BT.clamp(min=1e-12).pow(-alpha), 0.0)
    if rescale:
        total_B1 = (k_BT * masked_BT).sum(1, keepdim=True)
        k_BT = torch.where(total_B1 > 0, k_BT / total_B1, 0.0)
    return k_BT[:, step_L].to(device=device, dtype=dtype)


def _counts(counts: Sequence[int], alpha: float) -> Tensor:
    if len(counts) == 0 or any(n < 1 for n in counts):
        raise ValueError(f"counts must be the tokens of at least one step, each at least 1, got {list(counts)}")
    if not math.isfinite(alpha):
        raise ValueError(f"alpha must be a finite number, got {alpha}")
    return torch.tensor(list(counts), dtype=torch.float64)
