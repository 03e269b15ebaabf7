"""What the engine gives its models, and what it makes of their answers, in closed form; models here say what is set."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from varl.rewards import engine as room
from varl.rewards.engine import (
    OcrConfig,
    OcrEngine,
    Unread,
    find_cores,
    to_pixels,
)
from varl.run_config import MOST_THREADS


def box(x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], np.float32)


GOOD: list[dict[str, Any]] = [
    {"threads": 1},
    {"det_min_side": 1},
    {"det_min_side": 64, "det_side_limit": 64},
    {"box_thresh": 0.0},
    {"small_squeeze": 1.0},
]
BAD: list[tuple[dict[str, Any], str]] = [
    ({"threads": 0}, f"threads must be from 1 to {MOST_THREADS}, got 0"),
    ({"threads": 10**8}, f"threads must be from 1 to {MOST_THREADS}, got 100000000"),
    ({"polygon_unclip": 1e300}, "polygon_unclip and crop_unclip must be from 0 to 10, got 1e+300 and 1.0"),
    ({"crop_unclip": float("nan")}, "polygon_unclip and crop_unclip must be from 0 to 10, got 0.6 and nan"),
    ({"crop_unclip": -0.1}, "polygon_unclip and crop_unclip must be from 0 to 10, got 0.6 and -0.1"),
    ({"det_side_limit": 10**9}, "need 1 <= det_min_side <= det_side_limit <= 16384, got 64 and 1000000000"),
    ({"det_min_side": 0}, "need 1 <= det_min_side <= det_side_limit <= 16384, got 0 and 960"),
    ({"det_min_side": 65, "det_side_limit": 64}, "need 1 <= det_min_side <= det_side_limit <= 16384, got 65 and 64"),
    ({"det_thresh": 0.0}, "thresholds lie in (0, 1), got 0.0 and 0.5"),
    ({"det_thresh": 1.0}, "thresholds lie in (0, 1), got 1.0 and 0.5"),
    ({"box_thresh": -0.01}, "thresholds lie in (0, 1), got 0.3 and -0.01"),
    ({"box_thresh": 1.0}, "thresholds lie in (0, 1), got 0.3 and 1.0"),
    ({"small_squeeze": 0.0}, "small_squeeze must be in (0, 1], got 0.0"),
    ({"small_squeeze": 1.01}, "small_squeeze must be in (0, 1], got 1.01"),
]


@pytest.mark.parametrize("given", GOOD)
def test_settings_at_their_bounds_are_taken(given: dict[str, Any]) -> None:
    assert {name: getattr(OcrConfig(**given), name) for name in given} == given


@pytest.mark.parametrize(("given", "said"), BAD)
def test_settings_beyond_their_bounds_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=r"must|need|lie") as raised:
        OcrConfig(**given)
    assert str(raised.value) == said


def test_pixels_are_rounded_and_bounded_and_channels_last() -> None:
    picture = torch.tensor([-0.5, 1.7, 0.2, 100.6 / 255, 100.4 / 255, 1.0]).reshape(1, 3, 1, 2)
    (pixels,) = to_pixels(picture)
    assert isinstance(pixels, np.ndarray)
    assert pixels.tolist() == [[[0, 51, 100], [255, 101, 255]]]
    assert (pixels.dtype, pixels.flags.c_contiguous) == (np.uint8, True)
    (whole,) = to_pixels(torch.rand(1, 3, 5, 7))
    assert isinstance(whole, np.ndarray)
    assert whole.flags.c_contiguous


def test_pixels_of_short_numbers_are_computed_in_long_ones() -> None:
    picture = torch.linspace(0, 1, 48).reshape(1, 3, 4, 4).bfloat16()
    (pixels,) = to_pixels(picture)
    assert np.array_equal(pixels, (picture[0].double() * 255).round().permute(1, 2, 0).numpy())


@pytest.mark.parametrize("shape", [(5, 3, 7), (2, 3, 4, 4, 4), (1, 4, 8, 8)])
def test_shapes_that_are_no_pictures(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must be") as raised:
        to_pixels(torch.zeros(shape))
    assert str(raised.value) == f"images must be [batch, 3, height, width], got {shape}"


def test_each_picture_is_checked_by_itself() -> None:
    pictures = torch.zeros(3, 3, 2, 2)
    pictures[0, 2, 1, 1], pictures[2, 0, 0, 0] = torch.inf, -torch.inf
    first, second, third = to_pixels(pictures)
    assert first == third == Unread("the picture has a value that is not finite")
    assert isinstance(second, np.ndarray)


@pytest.mark.parametrize(("threads", "pictures", "pooled"), [(1, 3, False), (2, 1, False), (2, 2, True), (2, 0, False)])
def test_only_several_pictures_go_to_several_threads(
    threads: int, pictures: int, pooled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, pool, main = [], room.ThreadPoolExecutor, threading.main_thread()
    monkeypatch.setattr(room, "ThreadPoolExecutor", lambda *given: made.append(given) or pool(*given))
    reader = OcrEngine(OcrConfig(threads=threads))
    monkeypatch.setattr(reader, "read_picture", lambda shown: [shown.shape, threading.current_thread() is main])
    assert reader.read(torch.zeros(pictures, 3, 4, 5)) == [[(4, 5, 3), not pooled]] * pictures
    assert made == ([(threads,)] if pooled else [])


class Models:
    """Stands for both models: a map of the detector's, and a reading that is the same for every cut-out."""

    def __init__(self, core: Any, read: np.ndarray | None = None) -> None:
        self.core, self.given, self.crops = core, [], []  # type: ignore[var-annotated]
        self.probabilities = np.eye(3, dtype=np.float32)[[1]] * 0.5 if read is None else read

    def get_inputs(self) -> list[Any]:
        return [SimpleNamespace(name="x")]

    def run(self, outputs: Any, named: dict[str, np.ndarray]) -> list[np.ndarray]:
        assert outputs is None
        (picture,) = named.values()
        assert list(named) == ["x"]
        if picture.shape[2] == 48:
            self.crops.append(picture)
            return [self.probabilities[None]]
        self.given.append(picture)
        found = np.zeros((1, 1, *picture.shape[2:]), np.float32)
        for x0, y0, x1, y1 in self.core:
            found[..., y0:y1, x0:x1] = 0.9
        return [found]


def looking(models: Models, **settings: Any) -> OcrEngine:
    reader = OcrEngine(OcrConfig(**settings))
    reader._models = models, models, ["", "a", " "]
    return reader


def polygons(lines: Any) -> list[Any]:
    return [line.polygon.tolist() for line in lines]


def test_a_picture_goes_to_the_detector_at_its_size_in_blue_green_red() -> None:
    models = Models([])
    picture = np.zeros((70, 64, 3), np.uint8)
    picture[..., 0], picture[69, 63] = 255, (0, 51, 102)
    assert looking(models).read_picture(picture) == []
    (given,) = models.given
    assert (given.shape, given.dtype) == ((1, 3, 96, 64), np.float32)
    assert given[0, :, 0, 0].tolist() == [-1, -1, 1]
    assert given[0, :, 69, 63].tolist() == pytest.approx([102 / 127.5 - 1, 51 / 127.5 - 1, -1], abs=1e-6)
    assert (given[0, :, 70:] == given[0, :, 69:70]).all()  # the last row, again


@pytest.mark.parametrize(
    ("shape", "settings", "seen", "core"),
    [
        ((64, 64), {}, (64, 64), (0, 0, 10, 20, 1, 1)),
        ((40, 150), {}, (64, 256), (16, 32, 240, 64, 0.625, 0.625)),
        ((150, 40), {}, (256, 64), (32, 16, 64, 240, 0.625, 0.625)),
        ((512, 1024), {"det_side_limit": 512}, (256, 512), (10, 20, 30, 40, 2, 2)),
        ((33, 50), {"det_min_side": 33}, (64, 64), (0, 0, 50, 33, 1, 1)),
        ((1, 4000), {"det_side_limit": 96, "det_min_side": 1}, (32, 96), (0, 0, 0, 0, 1, 1)),
        ((4000, 1), {"det_side_limit": 96, "det_min_side": 1}, (96, 32), (0, 0, 0, 0, 1, 1)),
        ((2, 40), {"det_side_limit": 80, "det_min_side": 8}, (32, 96), (10, 0, 30, 4, 0.5, 0.5)),
    ],
)
def test_sizes_at_which_the_detector_looks(
    shape: tuple[int, int], settings: dict[str, Any], seen: tuple[int, int], core: tuple[float, ...]
) -> None:
    """Cores come back in pixels of the picture; what lies in the border that fills the sides up is cut off."""
    x0, y0, x1, y1, across, down = core
    models = Models([(int(x0), int(y0), int(x1), int(y1))])
    reader = looking(models, **settings)
    found = reader._detect(models, np.zeros((*shape, 3), np.uint8))
    assert [given.shape for given in models.given] == [(1, 3, *seen)]
    expected = [box(x0 * across, y0 * down, x1 * across, y1 * down)] if x1 else []
    np.testing.assert_allclose(np.array(found).reshape(-1, 4, 2), np.array(expected).reshape(-1, 4, 2), atol=1e-4)
    assert all(one.dtype == np.float32 for one in found)


def test_a_blob_over_the_border_ends_with_the_picture() -> None:
    models = Models([(50, 60, 96, 96)])
    (found,) = looking(models)._detect(models, np.zeros((70, 80, 3), np.uint8))
    assert found.tolist() == box(50, 60, 80, 70).tolist()
    thin = Models([(0, 0, 32, 32)])
    for shape in ((1, 40), (40, 1)):  # one pixel across is no line
        assert looking(thin, det_min_side=1, det_side_limit=40)._detect(thin, np.zeros((*shape, 3), np.uint8)) == []
    assert looking(thin, det_min_side=1, det_side_limit=4)._detect(thin, np.zeros((1, 99, 3), np.uint8)) == []
    assert looking(thin, det_min_side=1, det_side_limit=4)._detect(thin, np.zeros((99, 1, 3), np.uint8)) == []


def test_shrinking_takes_means_and_enlarging_goes_in_straight_lines() -> None:
    models, noise = Models([]), np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    looking(models, det_side_limit=64, det_min_side=1)._detect(models, noise)
    means = noise.reshape(64, 4, 64, 4, 3).mean((1, 3)).transpose(2, 0, 1)
    np.testing.assert_allclose((models.given[0][0] + 1) * 127.5, means, atol=0.51)
    step = np.zeros((32, 32, 3), np.uint8)
    step[:, 16:] = 200
    looking(models)._detect(models, step)
    # Twice as large, so pixels lie a quarter from the old ones' centres.
    assert (((models.given[1][0, 0, 0, 30:34] + 1) * 127.5).round()).tolist() == [0, 50, 150, 200]


def test_thresholds_are_those_of_the_settings() -> None:
    models = Models([(0, 0, 10, 10)])  # at 0.9
    picture = np.zeros((64, 64, 3), np.uint8)
    assert len(looking(models, det_thresh=0.85, box_thresh=0.85)._detect(models, picture)) == 1
    assert not looking(models, det_thresh=0.95)._detect(models, picture)
    assert not looking(models, box_thresh=0.95)._detect(models, picture)


def test_cores_are_edges_of_blobs() -> None:
    found = np.zeros((40, 60), np.float32)
    found[5:9, 10:30] = 0.75
    found[20:22, 40:42] = 1
    found[30, 10:30] = 1  # too thin
    found[30:39, 50] = 1
    cores = find_cores(found, 0.5, 0.75)
    assert sorted(core.tolist() for core in cores) == [box(10, 5, 30, 9).tolist(), box(40, 20, 42, 22).tolist()]
    assert all(core.dtype == np.float32 for core in cores)
    assert len(find_cores(found, 0.75, 0.5)) == 1  # above the threshold, not at it
    assert len(find_cores(found, 0.5, 0.76)) == 1


def test_a_blob_is_as_likely_as_its_own_pixels_with_its_holes() -> None:
    corner = np.zeros((20, 20), np.float32)
    corner[2:12, 2:4] = corner[10:12, 2:12] = 0.8  # most of its bounding box is empty
    assert len(find_cores(corner, 0.5, 0.75)) == 1
    ring = np.full((12, 12), 0.8, np.float32)
    ring[2:10, 2:10] = 0.1  # 64 of 144 pixels
    inside = (80 * 0.8 + 64 * 0.1) / 144
    assert len(find_cores(ring, 0.5, inside - 0.01)) == 1
    assert find_cores(ring, 0.5, inside + 0.01) == []


def test_corners_go_clockwise_from_the_top_left_however_sorting_treats_equals(monkeypatch: pytest.MonkeyPatch) -> None:
    """A square on its corner has two corners above each other; a sort that is not stable may give either first."""
    row = np.arange(21)
    diamond = (abs(row[:, None] - 10) + abs(row - 10) <= 8).astype(np.float32)
    (core,) = find_cores(diamond, 0.5, 0.5)
    sides = np.roll(core, -1, axis=0) - core
    turns = sides[:, 0] * np.roll(sides[:, 1], -1) - sides[:, 1] * np.roll(sides[:, 0], -1)
    assert (turns > 0).all()
    assert core[:, 0].mean() == pytest.approx(10.5, abs=0.01)
    argsort = np.argsort

    def other_way(values: np.ndarray, *, kind: str = "quicksort") -> np.ndarray:
        return argsort(values, kind="stable") if kind == "stable" else len(values) - 1 - argsort(values[::-1])

    monkeypatch.setattr(np, "argsort", other_way)
    assert find_cores(diamond, 0.5, 0.5)[0].tolist() == core.tolist()
