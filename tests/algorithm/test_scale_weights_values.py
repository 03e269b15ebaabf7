"""Weights of tokens: types, defaults, soft masks, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from varl.algorithm import scale_weights, step_shares, token_weights

COUNTS = [1, 4]


def test_types_and_defaults() -> None:
    mask = torch.ones(2, 5, dtype=torch.float64).requires_grad_()
    for count in ("grid", "masked"):
        given: Any = {"mask_BL": mask, "count": count}
        assert token_weights(COUNTS, **given).dtype == torch.float32
        assert token_weights(COUNTS, dtype=torch.float64, **given).dtype == torch.float64
        assert not token_weights(COUNTS, **given).requires_grad
        raw = 4**-0.6
        expected = [1 / (1 + 4 * raw)] + [raw / (1 + 4 * raw)] * 4
        assert token_weights(COUNTS, **given).reshape(-1, 5)[0].tolist() == pytest.approx(expected)
    assert token_weights(COUNTS).shape == (5,)
    assert scale_weights(COUNTS).tolist() == pytest.approx([1, 4**-0.6])
    assert (scale_weights(COUNTS).dtype, scale_weights(COUNTS, dtype=torch.float64).dtype) == (
        torch.float32,
        torch.float64,
    )
    shares = step_shares(COUNTS)
    assert shares.dtype == torch.float64
    assert shares.tolist() == pytest.approx([1 / (1 + 4**0.4), 4**0.4 / (1 + 4**0.4)])
    assert scale_weights(COUNTS, 0.6, dtype=torch.float64)[1].item() == pytest.approx(4**-0.6, rel=1e-14)
    assert token_weights(COUNTS, 0.6, dtype=torch.float64).sum().item() == pytest.approx(1, rel=1e-14)


def test_soft_masks_count_what_they_hold() -> None:
    mask = torch.tensor([[0.5, 0.25, 0.25, 0.0, 0.0], [0.0, 1.5e-12, 0.0, 0.0, 0.0]])
    raw = token_weights(COUNTS, 1.0, rescale=False, mask_BL=mask, count="masked")
    assert raw[0].tolist() == [2.0] * 5
    assert raw[1].tolist() == pytest.approx([0.0] + [1 / 1.5e-12] * 4)
    # A mask of next to nothing makes no weight beyond a trillion.
    least = token_weights(COUNTS, 1.0, rescale=False, mask_BL=mask * 1e-3, count="masked")
    assert least[1].tolist() == pytest.approx([0.0] + [1e12] * 4)
    whole = token_weights(COUNTS, 0.0, mask_BL=mask, count="masked")
    assert whole[0].tolist() == pytest.approx([1.0] * 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: token_weights([]), "counts must be the tokens of at least one step"),
        (lambda: token_weights([0]), "each at least 1"),
        (lambda: token_weights([4], float("inf")), "alpha must be a finite number"),
        (lambda: scale_weights([4], float("nan")), "alpha must be a finite number"),
        (lambda: token_weights([4], count="masked"), r"shape \[batch, 4\], one column a trained token, got none"),
        (lambda: token_weights([4], count="masked", mask_BL=torch.ones(4)), r"got shape \(4,\)"),
        (lambda: token_weights([4], count="masked", mask_BL=torch.ones(1, 3)), r"got shape \(1, 3\)"),
        (lambda: token_weights([4], count="masked", mask_BL=torch.ones(1, 4, 1)), r"got shape \(1, 4, 1\)"),
    ],
)
def test_what_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
    assert token_weights([1]).tolist() == [1.0]
