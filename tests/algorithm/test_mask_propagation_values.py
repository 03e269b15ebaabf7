"""Rasterising and merging against closed forms and under symmetries, and what each function refuses."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from varl.algorithm import gradient_mask, merge_masks, propagate, rasterise, token_masks
from varl.schedule import ScaleSchedule

SIZE, GRID = (40, 60), (5, 6)  # cells of 8 x 10 pixels
SCHEDULE = ScaleSchedule(((1, 1), (2, 3), (5, 6)), stride=8)
ELL = np.array([[4, 4], [30, 4], [30, 11], [13, 11], [13, 35], [4, 35]], dtype=np.float64)


def box(x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], dtype=np.float64)


def covered(x0: float, y0: float, x1: float, y1: float) -> torch.Tensor:
    """The share of each cell that a box covers: length across times length down."""

    def lengths(low: float, high: float, cells: int, size: float) -> list[float]:
        side = size / cells
        return [max(min(high, (i + 1) * side) - max(low, i * side), 0) / side for i in range(cells)]

    across, down = lengths(x0, x1, GRID[1], SIZE[1]), lengths(y0, y1, GRID[0], SIZE[0])
    return torch.tensor([[a * d for a in across] for d in down], dtype=torch.float32)


def polygons(count: int, seed: int = 0) -> list[np.ndarray]:
    """Star-shaped polygons of 3 to 7 corners, concave ones among them, some partly outside."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        angle = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 8)))
        radius = rng.uniform(4, 22, len(angle))
        centre = rng.uniform((0, 0), (SIZE[1], SIZE[0]))
        found.append(centre + radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1))
    return found


@pytest.mark.parametrize("orientation", [1, -1])
def test_boxes_cover_length_times_length(orientation: int) -> None:
    """Anywhere: inside, across every side of the picture, on the cells' edges, outside."""
    xs, ys = (-13.0, 3.0, 10.0, 37.5, 60.0, 71.0), (-9.0, 2.0, 8.0, 21.5, 40.0, 55.0)
    for (x0, x1), (y0, y1) in itertools.product(itertools.combinations(xs, 2), itertools.combinations(ys, 2)):
        expected = covered(x0, y0, x1, y1)
        corners = box(x0, y0, x1, y1)[::orientation]
        for start in range(4):  # whichever corner is the first
            soft = rasterise([np.roll(corners, start, 0)], SIZE, GRID, mode="soft")
            torch.testing.assert_close(soft, expected, atol=1e-6, rtol=0)
        assert torch.equal(rasterise([corners], SIZE, GRID), (expected > 1e-6).float())


def test_what_overlaps_less_than_a_millionth_of_a_cell_is_rounding() -> None:
    for width, expected in ((0.5e-5, 0), (2e-5, 1)):  # of a cell of 10 by 8 pixels: half and two millionths
        mask = rasterise([box(10, 8, 20 + width, 16)], SIZE, GRID)
        assert (mask[1, 1].item(), mask[1, 2].item()) == (1, expected)


@pytest.mark.parametrize("mode", ["overlap", "soft"])
def test_rounding_is_no_area(mode: Any) -> None:
    """Where a polygon does not reach, the mask is exactly 0.

    A token with 1e-17 would count as masked, and a picture whose regions lie outside it as one with regions.
    """
    outside = [polygon + offset for polygon in polygons(60, seed=5) for offset in ([120, 0], [-120, 0], [0, 90])]
    masks = token_masks([[polygon] for polygon in outside], SIZE, SCHEDULE, mode=mode)
    assert masks.eq(1).all()  # all empty, so all ones
    for polygon in polygons(60):
        mask = rasterise([polygon], SIZE, GRID, mode=mode)
        assert mask[mask > 0].min() > 1e-6


def test_areas_add_up_and_do_not_depend_on_the_grid() -> None:
    """The sum over cells is the polygon's area (by the shoelace formula), whatever the cells."""
    for polygon in polygons(40):
        if (polygon < 0).any() or (polygon > (SIZE[1], SIZE[0])).any():
            continue
        x, y = polygon.T
        area = abs((x * np.roll(y, -1) - np.roll(x, -1) * y).sum()) / 2
        for grid in ((1, 1), (5, 6), (3, 7), (40, 60)):
            soft = rasterise([polygon], SIZE, grid, mode="soft")
            assert soft.sum().item() * SIZE[0] * SIZE[1] / (grid[0] * grid[1]) == pytest.approx(area, rel=1e-4)


@pytest.mark.parametrize("options", [{}, {"dilation": 2.5}, {"shape": "box"}, {"shape": "box", "dilation": 4.0}])
@pytest.mark.parametrize("mode", ["overlap", "soft"])
def test_across_and_down_are_alike(mode: Any, options: dict[str, Any]) -> None:
    """Mirrored, turned over or scaled pictures have mirrored, turned over and the same masks."""
    height, width = SIZE
    for polygon in [ELL, *polygons(15, seed=1)]:
        plain = rasterise([polygon], SIZE, GRID, mode=mode, **options)
        turned = rasterise([polygon[:, ::-1]], (width, height), GRID[::-1], mode=mode, **options)
        across = rasterise([[width, 0] + polygon * [-1, 1]], SIZE, GRID, mode=mode, **options)
        down = rasterise([[0, height] + polygon * [1, -1]], SIZE, GRID, mode=mode, **options)
        larger = {**options, "dilation": 3 * options.get("dilation", 0.0)}
        scaled = rasterise([3 * polygon], (3 * height, 3 * width), GRID, mode=mode, **larger)
        for found, expected in ((turned.T, plain), (across.flip(1), plain), (down.flip(0), plain), (scaled, plain)):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_box_is_that_around_the_polygon() -> None:
    for polygon in [ELL, *polygons(10, seed=2)]:
        x0, y0, x1, y1 = (float(value) for value in (*polygon.min(0), *polygon.max(0)))
        found = rasterise([polygon], SIZE, GRID, shape="box", mode="soft")
        torch.testing.assert_close(found, covered(x0, y0, x1, y1), atol=1e-6, rtol=0)
        grown = rasterise([polygon], SIZE, GRID, shape="box", mode="soft", dilation=3.0)
        torch.testing.assert_close(grown, covered(x0 - 3, y0 - 3, x1 + 3, y1 + 3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dilation", [1.0, 4.0])
def test_dilated_polygons_are_the_points_near_them(dilation: float) -> None:
    """Against a fine sampling: within so many pixels, across and down, of a point of the polygon."""
    fine = 4  # samples a pixel
    for polygon in [ELL, *polygons(6, seed=3)]:
        inside = rasterise([polygon], SIZE, (SIZE[0] * fine, SIZE[1] * fine), mode="soft")[None, None]
        reach = int(dilation * fine)
        near = torch.nn.functional.max_pool2d(inside, 2 * reach + 1, 1, reach)[0, 0] > 0
        share = near.float().unflatten(0, (GRID[0], -1)).unflatten(2, (GRID[1], -1)).mean((1, 3))
        mask = rasterise([polygon], SIZE, GRID, dilation=dilation)
        # The sampling is a sample wider than the polygon at most, and knows nothing of its part outside the picture.
        assert ((share > 0.03) <= (mask > 0)).all()
        if (polygon > dilation).all() and (polygon < np.array([SIZE[1], SIZE[0]]) - dilation).all():
            assert torch.equal(mask > 0, share > 0)


@pytest.mark.parametrize("orientation", [1, -1])
def test_corners_on_a_straight_edge_change_nothing(orientation: int) -> None:
    """Such a polygon is convex: its dilation is one box, and so exact in soft coverage too."""
    corners = box(13, 9, 33, 27)
    middles = (corners + np.roll(corners, -1, 0)) / 2
    polygon = np.stack([corners, middles], 1).reshape(-1, 2)[::orientation]
    for dilation in (0.0, 3.0):
        found = rasterise([polygon], SIZE, GRID, mode="soft", dilation=dilation)
        expected = covered(13 - dilation, 9 - dilation, 33 + dilation, 27 + dilation)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_soft_masks_of_several_polygons_add_up_to_one_at_most() -> None:
    a, b, c = box(0, 0, 5, 8), box(5, 0, 8, 8), box(2, 0, 9, 8)
    one, two, three = (rasterise(each, SIZE, GRID, mode="soft")[0, 0].item() for each in ([a], [a, b], [a, b, c]))
    assert (one, two, three) == pytest.approx((0.5, 0.8, 1.0))
    assert rasterise([a, b, c], SIZE, GRID)[0].tolist() == [1, 0, 0, 0, 0, 0]


def test_pictures_and_their_regions_stay_together() -> None:
    """Without regions, with empty polygons, with several; in any order, and more than are worked on at once."""
    shapes = polygons(6, seed=4)
    kinds: list[list[np.ndarray]] = [
        [],
        shapes[:1],
        [np.zeros((0, 2))],
        shapes[1:4],
        [np.zeros((0, 2)), shapes[4]],
        shapes[5:],
    ]
    regions = [kinds[n % 6] for n in range(260)]
    masks = token_masks(regions, SIZE, SCHEDULE, mode="soft", dilation=1.5, empty="skip")
    for n in range(260):
        own = rasterise(kinds[n % 6], SIZE, GRID, mode="soft", dilation=1.5)
        torch.testing.assert_close(masks[n], propagate(own, SCHEDULE))
    assert token_masks([[]] * 300, SIZE, SCHEDULE, empty="skip").sum() == 0
    assert token_masks([], SIZE, SCHEDULE).shape == (0, SCHEDULE.tokens)


def test_types_and_shapes_of_masks() -> None:
    assert propagate(torch.ones(5, 6, dtype=torch.float64), SCHEDULE).dtype == torch.float64
    assert propagate(torch.ones(5, 6, dtype=torch.bool), SCHEDULE).dtype == torch.float32
    assert propagate(torch.ones(2, 3, 5, 6, dtype=torch.int64), SCHEDULE).shape == (2, 3, SCHEDULE.tokens)
    found = token_masks([[box(0, 0, 9, 9)]], SIZE, SCHEDULE)
    assert (found.dtype, found.shape) == (torch.float32, (1, SCHEDULE.tokens))
    gradient = gradient_mask(torch.ones(1, 3, 40, 60, dtype=torch.float64), 0.0, SCHEDULE)
    assert (gradient.dtype, gradient.shape) == (torch.float32, (1, SCHEDULE.tokens))
    assert gradient_mask(torch.ones(0, 3, 40, 60), 0.0, SCHEDULE).shape == (0, SCHEDULE.tokens)


@pytest.mark.parametrize("quantile", [0.0, 0.3, 0.5, 0.99])
def test_the_pixels_of_a_gradient_are_those_at_or_above_its_quantile(quantile: float) -> None:
    """Summed over channels without sign; each picture by its own; pixels without any are never in."""
    grad = torch.randn(2, 3, 40, 60, generator=torch.Generator().manual_seed(2))
    grad[1, :, :20] = 0
    grad[1] *= 100
    schedule = ScaleSchedule(((1, 1), (40, 60)), stride=1)
    found = gradient_mask(grad, quantile, schedule)[:, 1:].view(2, 40, 60)
    for n in range(2):
        size = grad[n].abs().sum(0)
        threshold = size.flatten().sort().values[int(quantile * size.numel())]
        assert torch.equal(found[n] > 0, (size >= threshold) & (size > 0))


def test_options_of_a_gradient_mask_reach_the_merge() -> None:
    grad = torch.zeros(4, 3, 40, 60)
    grad[0, 0, 1, 1] = grad[1, 2, 38, 58] = -1.0
    one, other = gradient_mask(grad[:2], 0.5, SCHEDULE)
    for merge, expected in (
        ("union", torch.maximum(one, other)),
        ("mean", (one + other) / 2),
        ("intersection", one * other),
    ):
        found = gradient_mask(grad, 0.5, SCHEDULE, continuations=2, merge=merge, empty="skip")  # type: ignore[arg-type]
        assert torch.equal(found, torch.stack([expected, torch.zeros_like(one)]))
    assert gradient_mask(grad, 0.5, SCHEDULE, continuations=2)[1].eq(1).all()


def test_masks_without_a_region_have_no_say() -> None:
    masks = torch.tensor([[0.0, 0.2, 0.6], [0.0, 0.0, 0.0], [0.4, 0.0, 0.2]])
    assert merge_masks(masks, how="union").tolist() == pytest.approx([0.4, 0.2, 0.6])
    assert merge_masks(masks, how="mean").tolist() == pytest.approx([0.2, 0.1, 0.4])
    assert merge_masks(masks, how="intersection").tolist() == pytest.approx([0.0, 0.0, 0.2])
    assert merge_masks(masks[1:2]).tolist() == [1, 1, 1]
    assert merge_masks(masks[1:2], empty="skip").tolist() == [0, 0, 0]
    assert merge_masks(masks.expand(2, 4, 3, 3)).shape == (2, 4, 3)


SQUARE = [box(0, 0, 8, 8)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rasterise(SQUARE, (0, 60), GRID), "image_size and grid must be positive"),
        (lambda: rasterise(SQUARE, (40, 0), GRID), "image_size and grid must be positive"),
        (lambda: rasterise(SQUARE, SIZE, (0, 6)), "image_size and grid must be positive"),
        (lambda: rasterise(SQUARE, (40, 60, 3), GRID), "image_size and grid must be positive"),
        (lambda: rasterise(SQUARE, SIZE, (5,)), "image_size and grid must be positive"),
        (lambda: rasterise(SQUARE, SIZE, GRID, mode="hard"), "mode must be one of overlap, soft"),
        (lambda: rasterise(SQUARE, SIZE, GRID, shape="circle"), "shape one of polygon, box"),
        (lambda: rasterise(SQUARE, SIZE, GRID, dilation=-1.0), "dilation must be a number of pixels, at least 0"),
        (lambda: rasterise(SQUARE, SIZE, GRID, dilation=float("inf")), "dilation must be a number of pixels"),
        (lambda: rasterise(SQUARE, SIZE, GRID, dilation=float("nan")), "dilation must be a number of pixels"),
        (lambda: rasterise([np.zeros((3, 3))], SIZE, GRID), "a polygon must be"),
        (lambda: rasterise([np.zeros(4)], SIZE, GRID), "a polygon must be"),
        (lambda: rasterise([np.array([[0, 0], [np.nan, 1], [2, 2]])], SIZE, GRID), "finite coordinates"),
        (lambda: rasterise([np.array([[0, 0], [np.inf, 1], [2, 2]])], SIZE, GRID), "finite coordinates"),
        (lambda: propagate(torch.zeros(6, 5), SCHEDULE), "finest grid's sides"),
        (lambda: propagate(torch.zeros(6), SCHEDULE), "finest grid's sides"),
        (lambda: token_masks([], SIZE, SCHEDULE, propagation="up"), "propagation must be one of"),
        (lambda: token_masks([], (0, 4), SCHEDULE), "image_size and grid must be positive"),
        (lambda: token_masks([], SIZE, SCHEDULE, mode="hard"), "mode must be one of"),
        (lambda: token_masks([], SIZE, SCHEDULE, shape="circle"), "shape one of"),
        (lambda: token_masks([], SIZE, SCHEDULE, dilation=-1.0), "dilation must be"),
        (lambda: token_masks([[]], SIZE, SCHEDULE, continuations=0), "continuations must divide"),
        (lambda: token_masks([[]] * 3, SIZE, SCHEDULE, continuations=2), "got 2 for 3 pictures"),
        (lambda: token_masks([[]], SIZE, SCHEDULE, merge="sum"), "union, mean, intersection"),
        (lambda: gradient_mask(torch.zeros(3, 40, 60), 0.5, SCHEDULE), "image_grad_B3HW must be"),
        (lambda: gradient_mask(torch.zeros(1, 3, 40, 60), -0.1, SCHEDULE), r"quantile must be in \[0, 1\)"),
        (lambda: gradient_mask(torch.zeros(1, 3, 40, 60), 1.0, SCHEDULE), r"quantile must be in \[0, 1\)"),
        (lambda: merge_masks(torch.zeros(2, 3), how="sum"), "how must be one of"),
        (lambda: merge_masks(torch.zeros(2, 3), empty="zeros"), "empty one of ones, skip"),
        (lambda: merge_masks(torch.zeros(2, 3), torch.ones(3, dtype=torch.bool)), "mask_KL must be"),
        (lambda: merge_masks(torch.zeros(3)), "mask_KL must be"),
    ],
)
def test_bad_arguments_are_refused_by_name(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
