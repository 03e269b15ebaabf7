"""Masks made in portions of any size are the same bits; what is rounding, and what odd input is read as."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch

from varl.algorithm import gradient_mask, portions, propagate, rasterise, token_masks
from varl.schedule import ScaleSchedule

SIZE, GRID = (40, 60), (5, 6)
SCHEDULE = ScaleSchedule(((1, 1), (2, 3), (5, 6)), stride=8)
STAR = np.array([[30, 2], [34, 16], [55, 20], [34, 24], [30, 38], [26, 24], [5, 20], [26, 16]], dtype=np.float64)
module = sys.modules["varl.algorithm.mask_propagation"]


def box(x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], dtype=np.float64)


def spied(monkeypatch: pytest.MonkeyPatch, name: str) -> list[tuple[Any, ...]]:
    seen: list[tuple[Any, ...]] = []
    inner = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *given: seen.append(given) or inner(*given))
    return seen


@pytest.mark.parametrize("most", [1, 150, 400, 10**9])
def test_portions_of_a_concave_polygon_are_the_same_bits(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its dilation is nine pieces, which portions part and mix with those of others."""
    regions = [[box(2, 2, 9, 9), STAR, box(40, 3, 57, 8)], [], [STAR / 2, STAR / 2 + 15], [STAR - 20]]
    for mode in ("soft", "overlap"):
        options: dict[str, Any] = {"mode": mode, "dilation": 2.5, "empty": "skip"}
        whole = token_masks(regions, SIZE, SCHEDULE, **options)
        with monkeypatch.context() as patch:
            patch.setattr(portions, "MOST", most)
            assert torch.equal(token_masks(regions, SIZE, SCHEDULE, **options), whole)
    soft = token_masks([[STAR]], SIZE, SCHEDULE, mode="soft", dilation=2.5)[0, -30:].view(5, 6)
    alone = [rasterise([piece], SIZE, GRID, mode="soft") for piece in module._pieces(STAR, "polygon", 2.5)]
    assert len(alone) == 9
    assert torch.equal(soft, torch.stack(alone).amax(0))


def test_how_much_is_worked_on_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures by their polygons' cells, 128 at most; pieces by the numbers that they make."""
    asked = spied(monkeypatch, "few_at_a_time")
    token_masks([[box(0, 0, 8, 8)], [], [STAR, STAR]], SIZE, SCHEDULE)
    assert asked == [([30, 0, 60], 128), ([60, 120, 120], 3)]
    areas = spied(monkeypatch, "_areas")
    rasterise([STAR], SIZE, GRID, dilation=1.0)
    assert asked[-1] == ([120] + [90] * 8, 9)
    assert [len(given[0]) for given in areas] == [9]
    areas.clear()
    monkeypatch.setattr(portions, "MOST", 300)
    rasterise([STAR], SIZE, GRID, dilation=1.0)
    assert [len(given[0]) for given in areas] == [3, 3, 3]  # 120 + 90 + 90, and then 90 each


@pytest.mark.parametrize("mode", ["soft", "overlap"])
def test_how_little_is_rounding(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A millionth of a cell, and exactly that much is rounding too."""
    for width, kept in ((0.75e-6, False), (1.25e-6, True)):
        mask = rasterise([box(0, 0, width, 1)], (1, 1), (1, 1), mode=mode)
        assert bool(mask.any()) is kept
    monkeypatch.setattr(module, "_SLIVER", 0.25)
    for width, kept in ((0.25, False), (0.3125, True)):
        mask = rasterise([box(0, 0, width, 1)], (1, 1), (1, 1), mode=mode)
        assert bool(mask.any()) is kept


def test_edges_along_the_picture_add_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of what a division leaves where it is not made gets into the areas."""
    divide = np.divide

    def poisoned(a: Any, b: Any, out: Any = None, where: Any = True) -> Any:
        return divide(a, b, out=np.full_like(a, np.nan) if out is None else out, where=where)

    monkeypatch.setattr(np, "divide", poisoned)
    soft = rasterise([box(5, 4, 25, 12)], SIZE, GRID, mode="soft")
    expected = torch.zeros(5, 6)
    expected[:2, :3] = torch.tensor([[0.25, 0.5, 0.25]])
    torch.testing.assert_close(soft, expected)


def test_an_edge_that_rounds_to_the_lower_side_of_the_picture() -> None:
    last = np.nextafter(1.0, 0.0)
    polygon = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, last], [0.5, 1.0], [0.0, last]])
    soft = rasterise([polygon], (1, 1), (1, 1), mode="soft")
    assert soft.item() == pytest.approx(1.0)


@pytest.mark.parametrize("kind", [np.uint8, np.int64, np.float32])
def test_polygons_of_any_kind_of_number(kind: Any) -> None:
    for options in ({}, {"dilation": 2.0}, {"shape": "box"}, {"shape": "box", "dilation": 2.0}):
        for polygon in (STAR, box(20, 8, 30, 16)):
            found, expected = (
                rasterise([p], SIZE, GRID, mode="soft", **options) for p in (polygon.astype(kind), polygon)
            )
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_the_smallest_pictures_and_schedules() -> None:
    assert rasterise([box(0, 0, 1, 1)], (1, 1), (1, 1)).tolist() == [[1.0]]
    one = ScaleSchedule(((2, 2),), stride=8)
    assert token_masks([[box(0, 0, 4, 4)]], (16, 16), one).tolist() == [[1.0, 0.0, 0.0, 0.0]]
    assert propagate(torch.eye(2), one).tolist() == [1.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "hard"}, "mode must be one of overlap, soft"),
        ({"shape": "disc"}, "shape one of polygon, box"),
        ({"dilation": -1.0}, "dilation must be a number of pixels"),
        ({"continuations": 0}, "continuations must divide the number of pictures, got 0 for 1 pictures"),
        ({"merge": "sum"}, "how must be one of union, mean, intersection and empty one of ones, skip"),
    ],
)
def test_token_masks_refuse_what_rasterise_refuses(options: dict[str, Any], message: str) -> None:
    for regions in ([[]], [[box(0, 0, 8, 8)]]):
        with pytest.raises(ValueError, match=message):
            token_masks(regions, SIZE, SCHEDULE, **options)
    with pytest.raises(ValueError, match="image_size and grid must be positive"):
        token_masks([[]], (0, 60), SCHEDULE)


def test_gradients_that_are_not_finite_and_low_precision() -> None:
    """Whatever is not finite counts as 0, and channels are added up in full precision; no graph is kept."""
    grad = torch.zeros(1, 3, 40, 60)
    grad[0, 0, 0, 0], grad[0, 1, 20, 30], grad[0, 2, 39, 59] = torch.nan, torch.inf, -torch.inf
    assert not gradient_mask(grad, 0.5, SCHEDULE, empty="skip").any()
    grad = torch.full((1, 3, 40, 60), 0.0, dtype=torch.bfloat16)
    grad[0, 0] = 256
    grad[0, 1, 3, 4] = 1
    grad = grad.requires_grad_()
    found = gradient_mask(grad, 0.99999, SCHEDULE)
    assert not found.requires_grad
    assert found[0, -30:].nonzero().tolist() == [[0]]
