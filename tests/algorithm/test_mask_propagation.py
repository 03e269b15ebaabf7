import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch

from varl.algorithm import gradient_mask, merge_masks, propagate, rasterise, token_masks
from varl.schedule import ScaleSchedule

SCHEDULE = ScaleSchedule.square([1, 2, 3, 4, 6, 8], stride=8)  # 64 x 64 pixels, grids that do not divide


def box(x0, y0, x1, y1):
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], dtype=np.float32)


def cells(mask):
    return {(int(i), int(j)) for i, j in (mask > 0).nonzero()}


def overlaps(i, n, j, m):
    """Do [i/n, (i+1)/n) and [j/m, (j+1)/m) share a length?"""
    return min(Fraction(i + 1, n), Fraction(j + 1, m)) > max(Fraction(i, n), Fraction(j, m))


def propagate_loop(mask, schedule):
    grids = {len(schedule) - 1: mask.tolist()}
    for t in range(len(schedule) - 2, -1, -1):
        (h, w), (hh, ww) = schedule.grids[t], schedule.grids[t + 1]
        grids[t] = [
            [
                max(
                    grids[t + 1][a][b]
                    for a in range(hh)
                    for b in range(ww)
                    if overlaps(i, h, a, hh) and overlaps(j, w, b, ww)
                )
                for j in range(w)
            ]
            for i in range(h)
        ]
    return torch.tensor([v for t in range(len(schedule)) for row in grids[t] for v in row])


# ---- rasterise


def test_cells_of_a_box_by_hand():
    # 4 x 4 cells of 8 pixels. x 4..12 covers columns 0 and 1, y 16..20 row 2 only (touching row 1's edge).
    mask = rasterise([box(4, 16, 12, 20)], (32, 32), (4, 4))
    assert mask.dtype == torch.float32
    assert cells(mask) == {(2, 0), (2, 1)}
    soft = rasterise([box(4, 16, 12, 20)], (32, 32), (4, 4), mode="soft")
    expected = torch.zeros(4, 4)
    expected[2, :2] = 0.25
    torch.testing.assert_close(soft, expected)


def test_touching_an_edge_is_not_overlap():
    assert cells(rasterise([box(8, 8, 16, 16)], (32, 32), (4, 4))) == {(1, 1)}
    assert cells(rasterise([box(8, 8, 16.01, 16)], (32, 32), (4, 4))) == {(1, 1), (1, 2)}


def test_x_is_across_and_y_is_down_and_sizes_need_not_be_square():
    mask = rasterise([box(50, 0, 64, 5)], (20, 64), (2, 8))
    assert cells(mask) == {(0, 6), (0, 7)}


def test_partly_and_wholly_outside():
    soft = rasterise([box(-100, -100, 4, 12)], (32, 32), (4, 4), mode="soft")
    expected = torch.zeros(4, 4)
    expected[0, 0], expected[1, 0] = 0.5, 0.25
    torch.testing.assert_close(soft, expected)
    assert rasterise([box(40, 0, 60, 32)], (32, 32), (4, 4)).sum() == 0
    assert rasterise([box(-9, 0, -1, 32), box(0, 33, 32, 50)], (32, 32), (4, 4)).sum() == 0
    assert rasterise([box(-50, -50, 90, 90)], (32, 32), (4, 4), mode="soft").eq(1).all()


def test_soft_coverage_of_a_triangle():
    # Right angle at the origin, legs 16 pixels: x + y < 16. One whole cell, two halves.
    triangle = np.array([[0, 0], [16, 0], [0, 16]])
    expected = torch.zeros(4, 4)
    expected[0, 0], expected[0, 1], expected[1, 0] = 1, 0.5, 0.5
    torch.testing.assert_close(rasterise([triangle], (32, 32), (4, 4), mode="soft"), expected)
    torch.testing.assert_close(rasterise([triangle[::-1]], (32, 32), (4, 4), mode="soft"), expected)
    # Legs of 12: cell (0, 1) keeps x < 12 - y, a triangle of legs 4 in 64 pixels; (0, 0) loses one.
    small = rasterise([triangle * 0.75], (32, 32), (4, 4), mode="soft")
    assert small[0, 1].item() == pytest.approx(8 / 64)
    assert small[0, 0].item() == pytest.approx(1 - 8 / 64)
    assert cells(rasterise([triangle], (32, 32), (4, 4))) == {(0, 0), (0, 1), (1, 0)}


def test_concave_polygons_leave_their_notch_empty():
    # A U: columns 0 and 2 for all rows, column 1 in the last row only (cells of 8).
    u = np.array([[0, 0], [8, 0], [8, 16], [16, 16], [16, 0], [24, 0], [24, 24], [0, 24]])
    expected = {(i, j) for i in range(3) for j in range(3)} - {(0, 1), (1, 1)}
    assert cells(rasterise([u], (24, 24), (3, 3))) == expected
    assert rasterise([u], (24, 24), (3, 3), shape="box").sum() == 9


def test_random_quads_match_a_fine_sampling():
    rng = np.random.default_rng(0)
    for _ in range(20):
        angle = np.sort(rng.uniform(0, 2 * np.pi, 4))
        if np.diff(angle).min() < 0.2:
            continue
        quad = rng.uniform(0, 40, 2) + 12 * np.stack([np.cos(angle), np.sin(angle)], 1)
        n = 400
        y, x = (np.mgrid[:n, :n] + 0.5) * (40 / n)
        inside = np.ones((n, n), bool)
        for p, q in zip(quad, np.roll(quad, -1, 0), strict=True):
            inside &= (q[0] - p[0]) * (y - p[1]) - (q[1] - p[1]) * (x - p[0]) >= 0
        sampled = torch.from_numpy(inside.reshape(5, 80, 5, 80).mean((1, 3))).float()
        soft = rasterise([quad], (40, 40), (5, 5), mode="soft")
        torch.testing.assert_close(soft, sampled, atol=0.02, rtol=0)
        hard = rasterise([quad], (40, 40), (5, 5))
        assert ((sampled > 0) <= (hard > 0)).all()
        assert torch.equal(hard > 0, soft > 1e-6)


def test_degenerate_polygons_cover_nothing_unless_dilated():
    line, point, nothing = np.array([[4, 4], [20, 20], [4, 4]]), np.array([[12.0, 12]]), np.zeros((0, 2))
    for polygon in (line, point, nothing, np.array([[1.0, 1], [9, 9]])):
        assert rasterise([polygon], (32, 32), (4, 4)).sum() == 0
    assert cells(rasterise([point], (32, 32), (4, 4), dilation=5)) == {(i, j) for i in range(3) for j in range(3)}
    assert cells(rasterise([point], (32, 32), (4, 4), dilation=4)) == {(1, 1)}
    assert cells(rasterise([line], (32, 32), (4, 4), shape="box")) == {(i, j) for i in range(3) for j in range(3)}


def test_dilation_grows_by_pixels_to_each_side():
    for shape in ("polygon", "box"):
        grown = rasterise([box(10, 10, 14, 14)], (32, 32), (4, 4), dilation=3.0, shape=shape, mode="soft")
        torch.testing.assert_close(grown, rasterise([box(7, 7, 17, 17)], (32, 32), (4, 4), mode="soft"))
    # A diamond of radius 4 grows to an octagon: area = 32 + perimeter-wise bands, by Minkowski's formula
    # area(P + Q) = area(P) + 2 V(P, Q) + area(Q) = 32 + 4 * 2 * 8 + 16.
    diamond = np.array([[16, 12], [20, 16], [16, 20], [12, 16]])
    grown = rasterise([diamond], (32, 32), (1, 1), dilation=2.0, mode="soft")
    assert grown.item() * 32 * 32 == pytest.approx(32 + 2 * 4 * 8 + 16, rel=1e-6)


def test_dilation_of_a_concave_polygon_is_the_union_over_its_outline():
    # An L in cells of 4 pixels; the notch's far corner stays empty.
    ell = np.array([[4, 4], [12, 4], [12, 8], [8, 8], [8, 28], [4, 28]])
    mask = rasterise([ell], (32, 32), (8, 8), dilation=4.0)
    expected = {(i, j) for i in range(8) for j in range(3)} | {(i, 3) for i in range(3)}
    assert cells(mask) == expected
    # Soft coverage is that of the pieces' largest: never more than the union covers.
    soft = rasterise([ell], (32, 32), (8, 8), dilation=1.0, mode="soft")
    assert soft[4, 1].item() == pytest.approx(1.0)
    assert soft[4, 0].item() == pytest.approx(0.25)
    assert soft[1, 3].item() == pytest.approx(0.25)


def test_several_polygons_unite():
    both = rasterise([box(0, 0, 8, 8), box(20, 20, 24, 24)], (32, 32), (4, 4))
    assert cells(both) == {(0, 0), (2, 2)}
    soft = rasterise([box(0, 0, 4, 8), box(4, 0, 6, 8), box(0, 0, 4, 8)], (32, 32), (4, 4), mode="soft")
    assert soft[0, 0] == 1  # cut at 1
    assert rasterise([], (32, 32), (4, 4)).sum() == 0


# ---- propagate


@pytest.mark.parametrize(("fine", "coarse", "where", "expected"), [
    # cell 3 of 8 is [2.25, 3) / 6: cell 2 of 6 only; cell 2 of 8 is [1.5, 2.25) / 6: cells 1 and 2.
    (8, 6, 3, {2}),
    (8, 6, 2, {1, 2}),
    (8, 6, 0, {0}),
    # cell 1 of 6 is [2/3, 4/3) / 4: cells 0 and 1; cell 5 of 6 is the last of 4.
    (6, 4, 1, {0, 1}),
    (6, 4, 5, {3}),
    (6, 4, 3, {2}),
    (3, 2, 1, {0, 1}),
])  # fmt: skip
def test_non_nested_grids_by_hand(fine, coarse, where, expected):
    schedule = ScaleSchedule(((coarse, 1), (fine, 1)))
    mask = torch.zeros(fine, 1)
    mask[where] = 1
    got = propagate(mask, schedule)
    assert set(got[:coarse].nonzero().flatten().tolist()) == expected
    assert torch.equal(got[coarse:], mask[:, 0])


@pytest.mark.parametrize("grids", [
    SCHEDULE.grids,
    ((1, 1), (2, 3), (3, 5), (4, 7), (5, 11)),
    tuple((s, s) for s in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12)),
    ((2, 2), (4, 3), (3, 4), (7, 7)),
])  # fmt: skip
def test_propagation_matches_exact_fractions(grids):
    schedule = ScaleSchedule(grids)
    g = torch.Generator().manual_seed(0)
    for density in (0.03, 0.2, 1.0):
        mask = (torch.rand(*grids[-1], generator=g) < density).float()
        assert torch.equal(propagate(mask, schedule), propagate_loop(mask, schedule))
    soft = torch.rand(*grids[-1], generator=g)
    assert torch.equal(propagate(soft, schedule), propagate_loop(soft, schedule))


def test_propagation_covers_every_source_and_keeps_shapes_and_limits():
    for i, j in itertools.product(range(8), repeat=2):
        mask = torch.zeros(8, 8)
        mask[i, j] = 1
        tokens = propagate(mask, SCHEDULE)
        assert tokens[0] == 1
        for step in range(len(SCHEDULE)):
            side = SCHEDULE.grids[step][0]
            part = tokens[SCHEDULE.tokens_of(step)].reshape(side, side)
            # At least every cell that overlaps the source itself; sequential propagation may widen it.
            for a, b in itertools.product(range(side), repeat=2):
                assert part[a, b] == 1 or not (overlaps(a, side, i, 8) and overlaps(b, side, j, 8))
    assert propagate(torch.ones(3, 2, 8, 8), SCHEDULE).eq(1).all()
    assert propagate(torch.zeros(3, 2, 8, 8, dtype=torch.bool), SCHEDULE).shape == (3, 2, SCHEDULE.tokens)
    batch = torch.rand(3, 2, 8, 8)
    assert torch.equal(propagate(batch, SCHEDULE)[2, 1], propagate(batch[2, 1], SCHEDULE))
    assert propagate(torch.zeros(0, 8, 8), SCHEDULE).shape == (0, SCHEDULE.tokens)


# ---- token_masks


def random_regions(n, seed=0):
    rng = np.random.default_rng(seed)
    regions = []
    for _ in range(n):
        corners = rng.uniform(0, 56, (rng.integers(0, 4), 2))
        regions.append([box(x, y, x + rng.uniform(2, 20), y + rng.uniform(2, 20)) for x, y in corners])
    return regions


@pytest.mark.parametrize("options", [
    {},
    {"mode": "soft"},
    {"dilation": 3.0},
    {"shape": "box"},
])  # fmt: skip
def test_a_batch_equals_picture_by_picture(options):
    regions = random_regions(300)  # more than one chunk
    assert any(not r for r in regions)
    got = token_masks(regions, (64, 64), SCHEDULE, **options)
    for n in (0, 1, 2, 127, 128, 129, 299):
        finest = rasterise(regions[n], (64, 64), (8, 8), **options)
        expected = propagate(finest, SCHEDULE) if regions[n] else torch.ones(SCHEDULE.tokens)
        torch.testing.assert_close(got[n], expected)


def test_direct_rasterises_every_grid_and_lies_inside_the_sequential_mask():
    regions = [r for r in random_regions(40) if r]
    direct = token_masks(regions, (64, 64), SCHEDULE, propagation="direct")
    for step, grid in enumerate(SCHEDULE.grids):
        for n, polygons in enumerate(regions):
            expected = rasterise(polygons, (64, 64), grid).flatten()
            assert torch.equal(direct[n, SCHEDULE.tokens_of(step)], expected)
    sequential = token_masks(regions, (64, 64), SCHEDULE)
    assert (direct <= sequential).all()
    assert (direct < sequential).any()


@pytest.mark.parametrize("propagation", ["sequential", "direct"])
def test_an_empty_mask_is_all_ones_or_skipped(propagation):
    regions = [[], [box(100, 100, 120, 120)], [box(0, 0, 3, 3)]]
    ones = token_masks(regions, (64, 64), SCHEDULE, propagation=propagation)
    assert ones[:2].eq(1).all()
    assert 0 < ones[2].sum() < SCHEDULE.tokens
    skip = token_masks(regions, (64, 64), SCHEDULE, propagation=propagation, empty="skip")
    assert skip[:2].eq(0).all()
    assert torch.equal(skip[2], ones[2])


def test_continuations_merge_per_prefix():
    a, b = [box(0, 0, 5, 5)], [box(50, 50, 60, 60)]
    separate = token_masks([a, b], (64, 64), SCHEDULE)
    merged = token_masks([a, b, a, [], [], []], (64, 64), SCHEDULE, continuations=2)
    assert merged.shape == (3, SCHEDULE.tokens)
    assert torch.equal(merged[0], torch.maximum(separate[0], separate[1]))
    assert torch.equal(merged[1], separate[0])  # the empty one has no say, it is not all ones
    assert merged[2].eq(1).all()
    both = token_masks([a, b], (64, 64), SCHEDULE, continuations=2, merge="intersection")
    assert torch.equal(both[0], separate[0] * separate[1])
    mean = token_masks([a, b, a, []], (64, 64), SCHEDULE, continuations=2, merge="mean", empty="skip")
    torch.testing.assert_close(mean[0], separate.mean(0))
    assert torch.equal(mean[1], separate[0])


def test_merge_masks_obeys_the_given_nonempty():
    masks = torch.tensor([[[0.0, 1.0, 0.5], [1.0, 0.0, 0.25]]])
    first = torch.tensor([[True, False]])
    for how in ("union", "mean", "intersection"):
        assert torch.equal(merge_masks(masks, first, how), masks[:, 0])
        assert merge_masks(masks, ~first & first, how).eq(1).all()
        assert merge_masks(masks, ~first & first, how, empty="skip").eq(0).all()
    assert merge_masks(masks, how="union").tolist() == [[1.0, 1.0, 0.5]]
    assert merge_masks(masks, how="mean").tolist() == [[0.5, 0.5, 0.375]]
    assert merge_masks(masks, how="intersection").tolist() == [[0.0, 0.0, 0.25]]


# ---- gradient_mask


def test_gradient_mask_takes_the_pixels_above_the_quantile():
    grad = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 0.01
    grad[0, 1, 17, 42] = -5.0  # sign does not matter; cell (2, 5) of 8
    got = gradient_mask(grad[:1], 0.9999, SCHEDULE)
    expected = torch.zeros(8, 8)
    expected[2, 5] = 1
    assert torch.equal(got[0], propagate(expected, SCHEDULE))
    # Half the pixels of one picture: a half-plane of gradient.
    half = torch.zeros(1, 3, 64, 64)
    half[..., :32] = 1 + grad[:1, :, :, :32]
    mask = gradient_mask(half, 0.5, SCHEDULE)[0, SCHEDULE.tokens_of(5)].reshape(8, 8)
    assert mask[:, :4].eq(1).all()
    assert mask[:, 4:].eq(0).all()


def test_gradient_mask_keeps_the_asked_fraction_of_pixels():
    grad = torch.randn(1, 1, 40, 40, generator=torch.Generator().manual_seed(1))
    schedule = ScaleSchedule.square([1, 40], stride=1)
    for quantile in (0.0, 0.25, 0.9):
        assert gradient_mask(grad, quantile, schedule)[0, 1:].mean().item() == pytest.approx(1 - quantile)


def test_gradient_mask_without_gradient_is_empty_and_ignores_what_is_not_finite():
    grad = torch.zeros(2, 3, 64, 64)
    grad[1, 0, 0, 0] = float("nan")
    assert gradient_mask(grad, 0.5, SCHEDULE).eq(1).all()
    assert gradient_mask(grad, 0.5, SCHEDULE, empty="skip").eq(0).all()
    grad[0, 0, 63, 63] = 1.0
    merged = gradient_mask(grad, 0.5, SCHEDULE, continuations=2)
    assert torch.equal(merged, gradient_mask(grad[:1], 0.5, SCHEDULE))
    assert merged[0, -1] == 1
    assert merged[0, SCHEDULE.offsets[5]] == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rasterise([np.zeros((3, 3))], (8, 8), (2, 2)), r"\[points, 2\]"),
        (lambda: rasterise([np.full((3, 2), np.nan)], (8, 8), (2, 2)), "finite"),
        (lambda: rasterise([], (8, 8), (2, 2), mode="hard"), "mode must be one of overlap, soft"),
        (lambda: rasterise([], (8, 8), (2, 2), shape="disc"), "shape"),
        (lambda: rasterise([], (8, 8), (2, 2), dilation=-1), "dilation"),
        (lambda: rasterise([], (0, 8), (2, 2)), "image_size"),
        (lambda: propagate(torch.zeros(7, 8), SCHEDULE), "finest grid"),
        (lambda: token_masks([[]], (64, 64), SCHEDULE, propagation="up"), "propagation"),
        (lambda: token_masks([[]], (64, 64), SCHEDULE, empty="zeros"), "empty"),
        (lambda: token_masks([[]] * 3, (64, 64), SCHEDULE, continuations=2), "3 pictures"),
        (lambda: merge_masks(torch.zeros(2, 3), torch.ones(3)), "mask_KL"),
        (lambda: merge_masks(torch.zeros(2, 3), how="sum"), "union, mean, intersection"),
        (lambda: gradient_mask(torch.zeros(3, 8, 8), 0.5, SCHEDULE), "image_grad"),
        (lambda: gradient_mask(torch.zeros(1, 3, 8, 8), 1.0, SCHEDULE), "quantile"),
    ],
)
def test_bad_arguments_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
