"""Mask Propagation: which tokens of every step a region of the picture came from.

Cells are real rectangles: cell (i, j) of an h x w grid covers [i/h, (i+1)/h) x [j/w, (j+1)/w) of the picture.
Two cells overlap if they share an area; touching along an edge is not overlap. Grids need not divide each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from varl.algorithm.portions import few_at_a_time
from varl.schedule import ScaleSchedule

__all__ = [
    "Coverage",
    "Empty",
    "Merge",
    "Propagation",
    "RegionShape",
    "gradient_mask",
    "merge_masks",
    "propagate",
    "rasterise",
    "token_masks",
]

Coverage = Literal["overlap", "soft"]
RegionShape = Literal["polygon", "box"]
Propagation = Literal["sequential", "direct"]
Empty = Literal["ones", "skip"]
Merge = Literal["union", "mean", "intersection"]
Array = np.ndarray

_SLIVER = 1e-6  # of a cell: smaller overlaps are rounding (polygons are float32), not area
_CHUNK = 128  # pictures at a time: bounds the memory, and hides the cost of a numpy call


def rasterise(
    polygons: Sequence[Array],
    image_size: tuple[int, int],
    grid: tuple[int, int],
    *,
    mode: Coverage = "overlap",
    shape: RegionShape = "polygon",
    dilation: float = 0.0,
) -> Tensor:
    """The cells of one grid that polygons cover.

    Areas are exact (each edge is cut at the grid lines and its signed area accumulated), for convex and
    concave polygons of either orientation, also partly or wholly outside the picture. Polygons without area
    (a point, a line, collinear points) cover nothing unless dilated. Edges should not cross: where they do,
    parts of opposite winding inside one cell cancel.

    Args:
        polygons: each [P, 2] of (x, y) in pixels, origin at the picture's top left corner, closed implicitly.
        image_size: (height, width) of the picture in pixels.
        grid: (h, w) cells.
        mode: ``overlap``: 1 where a polygon covers more than a millionth of the cell. ``soft``: the covered
            fraction, where it is more than a millionth, summed over polygons and cut at 1 (exact for polygons
            that do not overlap each other).
        shape: ``box`` replaces every polygon by its axis-aligned bounding box.
        dilation: pixels by which a polygon grows to each side (the union of the squares of side 2 * dilation
            around its points); exact, except that ``soft`` underestimates a dilated *concave* polygon.

    Returns:
        [h, w] float32 in [0, 1].

    Raises:
        ValueError: if a polygon is not [P, 2] or not finite, a size is not positive, ``dilation`` is
            negative, or an option is unknown.
    """
    _check_options(image_size, grid, mode, shape, dilation)
    return torch.from_numpy(_rasterise([polygons], image_size, grid, mode, shape, dilation)[0])


def propagate(mask_hw: Tensor, schedule: ScaleSchedule) -> Tensor:
    """Carry the finest grid's mask backward through the schedule (MP, paper section 3.5).

    From fine to coarse, a token takes the largest value among the tokens of the next finer grid that its cell
    overlaps; for a mask of 0 and 1 it is in if any of them is.

    Args:
        mask_hw: [..., h, w] in [0, 1], the mask of the last grid.
        schedule: the grids, whose last is (h, w).

    Returns:
        mask_L: [..., L], all steps flattened coarse to fine, row-major inside a grid; dtype and device of the
        input (float32 if that is bool or an integer type).

    Raises:
        ValueError: if ``mask_hw`` does not have the last grid's sides.
    """
    if mask_hw.ndim < 2 or tuple(mask_hw.shape[-2:]) != schedule.grids[-1]:
        raise ValueError(
            f"mask_hw must be [..., h, w] with the finest grid's sides {schedule.grids[-1]}, got {tuple(mask_hw.shape)}"
        )
    lead = mask_hw.shape[:-2]
    mask = mask_hw if mask_hw.is_floating_point() else mask_hw.float()
    mask = mask.reshape(-1, 1, *schedule.grids[-1])
    steps = [mask]
    for grid in reversed(schedule.grids[:-1]):
        steps.append(_overlap_max(steps[-1], grid))
    return torch.cat([step.flatten(1) for step in reversed(steps)], 1).reshape(*lead, schedule.tokens)


def token_masks(
    regions: Sequence[Sequence[Array]],
    image_size: tuple[int, int],
    schedule: ScaleSchedule,
    *,
    continuations: int = 1,
    merge: Merge = "union",
    propagation: Propagation = "sequential",
    empty: Empty = "ones",
    mode: Coverage = "overlap",
    shape: RegionShape = "polygon",
    dilation: float = 0.0,
) -> Tensor:
    """The token masks of a batch of pictures, or of the prefixes they continue (MP, paper section 3.5).

    Args:
        regions: for each of N pictures, the polygons that set its reward; see ``rasterise``.
        image_size: (height, width) in pixels of the pictures the polygons refer to.
        schedule: the grids.
        continuations: K. The N = B K pictures are K continuations of each of B prefixes, those of one prefix
            adjacent; their masks are merged by ``merge_masks``. 1 gives each picture its own mask.
        merge: how the K masks become one.
        propagation: ``sequential`` rasterises the finest grid and propagates; ``direct`` rasterises every
            grid.
        empty: what a sample gets none of whose regions covers anything: ``ones``, all tokens (failures need
            gradient), or ``skip``, none, which leaves it without a policy term.
        mode, shape, dilation: as for ``rasterise``.

    Returns:
        mask_BL: [N / K, L] float32 in [0, 1] on the CPU, all steps of the schedule; slice with
            ``schedule.span``.

    Raises:
        ValueError: as ``rasterise``; if N is not a multiple of K, or an option is unknown.
    """
    _check_options(image_size, schedule.grids[-1], mode, shape, dilation)
    if propagation not in get_args(Propagation):
        raise ValueError(f"propagation must be one of {', '.join(get_args(Propagation))}, got {propagation!r}")
    if propagation == "sequential":
        finest = _rasterise(regions, image_size, schedule.grids[-1], mode, shape, dilation)
        mask_NL = propagate(torch.from_numpy(finest), schedule)
    else:
        every = [_rasterise(regions, image_size, grid, mode, shape, dilation) for grid in schedule.grids]
        mask_NL = torch.cat([torch.from_numpy(grid).flatten(1) for grid in every], 1)
    return _merge_continuations(mask_NL, continuations, merge, empty)


def gradient_mask(
    image_grad_B3HW: Tensor,
    quantile: float,
    schedule: ScaleSchedule,
    *,
    continuations: int = 1,
    merge: Merge = "union",
    empty: Empty = "ones",
) -> Tensor:
    """Token masks from a differentiable reward: the pixels that move it most (ReFL's idea, method.md section
    6).

    A pixel is in if its sum over channels of |d reward / d pixel| is above 0 and at or above the given
    quantile of its own picture's; a token of the finest grid if its cell overlaps such a pixel; the other
    steps by ``propagate``.

    Args:
        image_grad_B3HW: [N, channels, H, W] gradient of each picture's reward, any scale. Non-finite entries
            count as 0.
        quantile: in [0, 1); 0.9 keeps the tenth of the pixels with the largest gradient.
        continuations, merge, empty: as for ``token_masks``; a picture without any gradient is empty.

    Returns:
        mask_BL: [N / K, L] float32 of 0 and 1 (or means of such), on the device of the gradient.

    Raises:
        ValueError: if the gradient is not 4-dimensional, the quantile is outside [0, 1), or as
            ``token_masks``.
    """
    if image_grad_B3HW.ndim != 4:
        raise ValueError(
            f"image_grad_B3HW must be [batch, channels, height, width], got shape {tuple(image_grad_B3HW.shape)}"
        )
    if not 0 <= quantile < 1:
        raise ValueError(f"quantile must be in [0, 1), got {quantile}")
    grad = torch.nan_to_num(image_grad_B3HW.detach().float(), nan=0.0, posinf=0.0, neginf=0.0)
    size_BHW = grad.abs().sum(1)
    # By kthvalue, picture by picture: torch.quantile refuses large inputs.
    rank = int(quantile * size_BHW[0].numel()) + 1 if len(size_BHW) else 1
    pixels = [((size >= size.flatten().kthvalue(rank).values) & (size > 0)).float() for size in size_BHW]
    stacked = torch.stack(pixels) if pixels else size_BHW
    finest = _overlap_max(stacked[:, None], schedule.grids[-1])[:, 0]
    return _merge_continuations(propagate(finest, schedule), continuations, merge, empty)


def merge_masks(
    mask_KL: Tensor, nonempty_K: Tensor | None = None, how: Merge = "union", *, empty: Empty = "ones"
) -> Tensor:
    """One mask from the K masks of a prefix's continuations; those that are empty have no say.

    Args:
        mask_KL: [..., K, L] in [0, 1].
        nonempty_K: [..., K] bool, which masks stand for a region; None: those with any value above 0.
        how: ``union`` (largest value), ``mean`` or ``intersection`` (smallest value) over the masks that are
            not empty.
        empty: the result where all K are empty: ``ones`` or, for ``skip``, zeros.

    Returns:
        mask_L: [..., L].

    Raises:
        ValueError: if shapes do not match or an option is unknown.
    """
    if how not in get_args(Merge) or empty not in get_args(Empty):
        raise ValueError(
            f"how must be one of {', '.join(get_args(Merge))} and empty one of {', '.join(get_args(Empty))}, "
            f"got {how!r} and {empty!r}"
        )
    if nonempty_K is None:
        nonempty_K = (mask_KL > 0).any(-1)
    if mask_KL.ndim < 2 or nonempty_K.shape != mask_KL.shape[:-1]:
        raise ValueError(
            "mask_KL must be [..., K, L] and nonempty_K [..., K], "
            f"got {tuple(mask_KL.shape)} and {tuple(nonempty_K.shape)}"
        )
    kept_K1 = nonempty_K[..., None]
    if how == "union":
        merged = torch.where(kept_K1, mask_KL, 0.0).amax(-2)
    elif how == "intersection":
        merged = torch.where(kept_K1, mask_KL, 1.0).amin(-2)
    else:
        merged = torch.where(kept_K1, mask_KL, 0.0).sum(-2) / kept_K1.sum(-2).clamp(min=1)
    return torch.where(kept_K1.any(-2), merged, 1.0 if empty == "ones" else 0.0)


def _merge_continuations(mask_NL: Tensor, k: int, merge: Merge, empty: Empty) -> Tensor:
    if k < 1 or mask_NL.shape[0] % k:
        raise ValueError(f"continuations must divide the number of pictures, got {k} for {mask_NL.shape[0]} pictures")
    return merge_masks(mask_NL.reshape(mask_NL.shape[0] // k, k, mask_NL.shape[1]), how=merge, empty=empty)


def _overlap_max(mask_N1hw: Tensor, grid: tuple[int, int]) -> Tensor:
    """The largest value among overlapped cells. Adaptive pooling's windows, floor(i h'/h) to ceil((i+1) h'/h), are
    exactly the cells that share an area with cell i, whether or not the sides divide each other."""
    if mask_N1hw.shape[0] == 0:
        return mask_N1hw.new_zeros(0, 1, *grid)
    return F.adaptive_max_pool2d(mask_N1hw, grid)


def _rasterise(
    regions: Sequence[Sequence[Array]],
    image_size: tuple[int, int],
    grid: tuple[int, int],
    mode: Coverage,
    shape: RegionShape,
    dilation: float,
) -> Array:
    """[N, h, w] float32 of N pictures; see ``rasterise``."""
    out = np.zeros((len(regions), *grid), np.float32)
    scale = np.array([grid[1] / image_size[1], grid[0] / image_size[0]])
    for some in few_at_a_time([len(polygons) * grid[0] * grid[1] for polygons in regions], _CHUNK):
        pieces: list[Array] = []
        polygon_starts: list[int] = []
        picture: list[int] = []
        for n in some:
            for polygon in regions[n]:
                if len(polygon):
                    polygon_starts.append(len(pieces))
                    picture.append(n)
                    pieces.extend(_pieces(polygon, shape, dilation))
        if not pieces:
            continue
        covered = _unions(pieces, polygon_starts, scale, grid)
        covered[covered <= _SLIVER] = 0.0
        if mode == "overlap":
            covered = (covered > 0).astype(np.float64)
        owners, starts = np.unique(picture, return_index=True)
        out[owners] = np.minimum(np.add.reduceat(covered, starts, axis=0), 1.0)
    return out


def _unions(pieces: list[Array], polygon_starts: list[int], scale: Array, grid: tuple[int, int]) -> Array:
    """[polygons, h, w]: the largest fraction of each cell that a piece of each polygon covers."""
    h, w = grid
    parts = list(few_at_a_time([max(len(piece) * (h + w + 4), h * (w + 1)) for piece in pieces], len(pieces)))
    if len(parts) == 1:
        covered = _areas(pieces, scale, grid)
        return covered if len(polygon_starts) == len(pieces) else np.maximum.reduceat(covered, polygon_starts, axis=0)
    out = np.zeros((len(polygon_starts), h, w))
    polygon = np.searchsorted(polygon_starts, np.arange(len(pieces)), side="right") - 1
    for part in parts:
        owners, starts = np.unique(polygon[part.start : part.stop], return_index=True)
        covered = np.maximum.reduceat(_areas(pieces[part.start : part.stop], scale, grid), starts, axis=0)
        out[owners] = np.maximum(out[owners], covered)
    return out


def _areas(pieces: list[Array], scale: Array, grid: tuple[int, int]) -> Array:
    """[pieces, h, w]: the fraction of each cell that each piece covers.

    An edge, going down by dy inside cell (i, j) at mean distance f from the cell's left side, adds an area of
    dy (1 - f) to that cell and of dy to every cell on its right: what it leaves at (i, j) and (i, j + 1) is summed
    along the row at the end. Around a closed polygon the signed areas add up to the covered one.
    """
    h, w = grid
    lengths = np.array([len(piece) for piece in pieces])
    ends = np.cumsum(lengths)
    start = np.concatenate(pieces).astype(np.float64)
    if not np.isfinite(start).all():
        raise ValueError("polygons must have finite coordinates (x, y) in pixels, got NaN or infinity")
    start = start * scale
    following = np.arange(1, len(start) + 1)
    following[ends - 1] = ends - lengths
    edge = start[following] - start

    cuts = [np.zeros((len(edge), 1)), np.ones((len(edge), 1))]
    for axis, lines in ((0, w), (1, h)):
        along = edge[:, axis : axis + 1]
        distance = np.arange(lines + 1) - start[:, axis : axis + 1]
        cuts.append(np.divide(distance, along, out=np.zeros_like(distance), where=along != 0))
    t = np.sort(np.clip(np.concatenate(cuts, 1), 0, 1))
    x = start[:, :1] + t * edge[:, :1]
    y = np.clip(start[:, 1:] + t * edge[:, 1:], 0, h)

    dy = y[:, 1:] - y[:, :-1]
    inside = dy != 0
    dy = dy[inside]
    middle_x = np.clip((x[:, 1:] + x[:, :-1])[inside] / 2, 0, w)
    row = np.minimum((y[:, 1:] + y[:, :-1])[inside] / 2, h - 1e-9).astype(np.int64)
    column = np.minimum(middle_x, w - 1).astype(np.int64)
    right = middle_x - column
    piece = np.repeat(np.repeat(np.arange(len(pieces)), lengths)[:, None], t.shape[1] - 1, 1)[inside]
    at = (piece * h + row) * (w + 1) + column
    size = len(pieces) * h * (w + 1)
    left = np.bincount(at, dy * (1 - right), size) + np.bincount(at + 1, dy * right, size)
    return np.abs(left.reshape(len(pieces), h, w + 1).cumsum(2)[:, :, :w])


def _pieces(polygon: Array, shape: RegionShape, dilation: float) -> list[Array]:
    """What to rasterise for one polygon: itself, its box, or the pieces whose union is it dilated by a
    square."""
    points = np.asarray(polygon)
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"a polygon must be [points, 2] of (x, y) in pixels, got shape {points.shape}")
    if shape == "box":
        (x0, y0), (x1, y1) = points.min(0), points.max(0)
        points = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
    if dilation == 0:
        return [points]
    points = points.astype(np.float64)
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * dilation
    following = np.roll(points, -1, 0)
    turn = _cross(following - points, np.roll(points, -2, 0) - following)
    if (turn >= 0).all() or (turn <= 0).all():
        return [_hull((points[:, None] + corners).reshape(-1, 2))]
    # Concave: itself and, along its outline, every edge dilated.
    edges = zip(points, following, strict=True)
    return [points, *(_hull(np.concatenate([p + corners, q + corners])) for p, q in edges)]


def _cross(a: Array, b: Array) -> Array:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def _hull(points: Array) -> Array:
    """The convex hull, by Andrew's monotone chain."""
    order = sorted(set(map(tuple, points.tolist())))
    halves: list[list[tuple[float, float]]] = []
    for chain in (order, order[::-1]):
        half: list[tuple[float, float]] = []
        for x, y in chain:
            while len(half) > 1:
                (ax, ay), (bx, by) = half[-2], half[-1]
                if (bx - ax) * (y - ay) - (by - ay) * (x - ax) > 0:
                    break
                half.pop()
            half.append((x, y))
        halves.append(half[:-1])
    return np.array(halves[0] + halves[1])


def _check_options(image_size: tuple[int, int], grid: tuple[int, int], mode: str, shape: str, dilation: float) -> None:
    if len(image_size) != 2 or len(grid) != 2 or min(image_size) < 1 or min(grid) < 1:
        raise ValueError(f"image_size and grid must be positive (height, width), got {image_size} and {grid}")
    if mode not in get_args(Coverage) or shape not in get_args(RegionShape):
        raise ValueError(
            f"mode must be one of {', '.join(get_args(Coverage))} and "
            f"shape one of {', '.join(get_args(RegionShape))}, "
            f"got {mode!r} and {shape!r}"
        )
    if not 0 <= dilation < float("inf"):
        raise ValueError(f"dilation must be a number of pixels, at least 0, got {dilation}")
