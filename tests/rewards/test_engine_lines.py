"""What the engine cuts out of a picture, how it decodes what is read there, and where it says that lies."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import onnxruntime
import pytest

from varl.rewards import engine as room
from varl.rewards.engine import (
    OcrConfig,
    OcrEngine,
    _cut_out,
    _decode,
    _grow,
    _model_files,
    _normalise,
    _part,
    _sides,
    in_reading_order,
)

from .test_engine_values import Models, box, looking, polygons

NOISE = np.random.default_rng(1).integers(0, 256, (260, 300, 3), np.uint8)


def test_sides_and_growth() -> None:
    assert _sides(box(10, 20, 30, 30)) == (20.0, 10.0)
    assert all(type(side) is float for side in _sides(box(10, 20, 30, 30)))
    # 0.6 * 200 / 60 = 2 on every side.
    grown = _grow(box(10, 20, 30, 30), 0.6)
    np.testing.assert_allclose(grown, box(8, 18, 32, 32), atol=1e-5)
    assert _grow(box(10, 20, 30, 30).astype(np.float64), 0.6).dtype == np.float32
    # 30 by 40 along (0.6, 0.8): grown by 30 * 40 / 140.
    along, down, by = np.array([0.6, 0.8]), np.array([-0.8, 0.6]), 1200 / 140
    core = np.array([[100, 100], 100 + 30 * along, 100 + 30 * along + 40 * down, 100 + 40 * down], np.float32)
    moved = [-along - down, along - down, along + down, down - along]
    np.testing.assert_allclose(_grow(core, 1.0), core + by * np.array(moved), atol=1e-4)


def test_parts_of_a_slanted_line() -> None:
    core = np.array([[0, 0], [40, 10], [36, 30], [-4, 20]], np.float32)
    part = _part(core.astype(np.float64), 0.25, 0.5)
    assert part.tolist() == [[10, 2.5], [20, 5], [16, 25], [6, 22.5]]
    assert part.dtype == np.float32


def test_models_see_numbers_from_minus_one_to_one() -> None:
    seen = _normalise(np.array([[[0, 51, 255]], [[102, 204, 153]]], np.uint8))
    assert (seen.shape, seen.dtype, seen.flags.c_contiguous) == ((1, 3, 2, 1), np.float32, True)
    assert seen.ravel().tolist() == pytest.approx([-1, -0.2, -0.6, 0.6, 1, 0.2], abs=1e-6)


WIDTHS = (48, 64, 80, 96, 112, 128, 160, 192, 256, 320, 480, 640, 960, 1280, 1920)


@pytest.mark.parametrize(("width", "wider"), list(zip(WIDTHS, [*WIDTHS[1:], 1920], strict=True)))
def test_a_cut_out_has_the_narrowest_width_that_holds_it(width: int, wider: int) -> None:
    blank = np.full((50, 50, 3), 255, np.uint8)
    for exact, filled, room_ in ((width, width, width), (width + 0.5, min(width + 1, 1920), wider)):
        crop, found = _cut_out(blank, box(0, 0, exact, 48), 1.0)
        assert (crop.shape, crop.dtype, found) == ((1, 3, 48, room_), np.float32, filled)
        assert type(found) is int
        assert (crop[..., :filled] == 1).all()
        assert (crop[..., filled:] == 0).all()


def test_no_cut_out_is_narrower_than_a_column() -> None:
    for width, filled in ((1, 8), (8, 8), (8.5, 9)):
        assert _cut_out(NOISE, box(0, 0, width, 48), 1.0)[1] == filled
    assert _cut_out(NOISE, box(0, 0, 100, 48), 0.6)[1] == 60
    assert _cut_out(NOISE, box(0, 0, 100, 24), 0.6)[1] == 120
    assert _cut_out(NOISE, box(0, 0, 24, 48), 0.3)[1] == 8


def seen(picture: np.ndarray, place: np.ndarray, squeeze: float = 1.0) -> np.ndarray:
    """A cut-out as pixels [48, W, 3]."""
    crop, width = _cut_out(picture, place, squeeze)
    pixels: np.ndarray = (crop[0, :, :, :width].transpose(1, 2, 0) + 1) * 127.5
    return pixels


def test_a_cut_out_at_scale_one_is_the_picture_there() -> None:
    np.testing.assert_allclose(seen(NOISE, box(20, 30, 90, 78)), NOISE[30:78, 20:90], atol=0.01)
    beyond = seen(NOISE, box(-10, -5, 60, 43))
    np.testing.assert_allclose(beyond[5:, 10:], NOISE[:43, :60], atol=0.01)
    assert (beyond[:5, :10].round() == NOISE[0, 0]).all()  # what lies outside is as the edge
    np.testing.assert_allclose(beyond[5:, 0], NOISE[:43, 0], atol=0.01)


def test_a_turned_box_is_read_along_its_first_side() -> None:
    turned = np.array([[68, 30], [68, 100], [20, 100], [20, 30]], np.float32)  # reading goes down from the top right
    np.testing.assert_allclose(seen(NOISE, turned), np.rot90(NOISE[30:100, 20:68]), atol=0.01)


def means(pixels: np.ndarray, side: int) -> np.ndarray:
    height, width = pixels.shape[0] // side, pixels.shape[1] // side
    taken: np.ndarray = pixels.reshape(height, side, width, side, 3).mean((1, 3))
    return taken


def test_lines_of_at_most_two_heights_are_warped_at_once() -> None:
    """Between four pixels: their mean, wherever the box begins."""
    np.testing.assert_allclose(seen(NOISE, box(21, 31, 161, 127)), means(NOISE[31:127, 21:161], 2), atol=1.01)


def test_taller_lines_are_shrunk_first_by_means() -> None:
    expected = means(NOISE[8:200, 40:280], 4)
    np.testing.assert_allclose(seen(NOISE, box(40, 8, 280, 200)), expected, atol=1.01)
    # Sides that are no multiple: each has its own share, here 66 of 265 rows and 75 of 300 columns.
    picture = np.repeat(np.arange(266, dtype=np.float32)[:, None] / 2, 300, 1)[:265, :, None].repeat(3, 2)
    picture = picture.round().astype(np.uint8)
    rows = seen(picture, box(0, 60, 96, 252))[:, 10, 0]
    np.testing.assert_allclose(rows, (60 + (np.arange(48) + 0.5) * 4 - 0.5) / 2, atol=1.1)
    columns = seen(picture.transpose(1, 0, 2), box(60, 0, 252, 192))[10, :, 0]
    np.testing.assert_allclose(columns, (60 + (np.arange(48) + 0.5) * 4 - 0.5) / 2, atol=1.1)


SIXTY = np.zeros((64, 64, 3), np.uint8)


def test_a_line_has_the_text_and_the_grown_polygon() -> None:
    models = Models([(10, 20, 30, 30)])
    (line,) = looking(models).read_picture(SIXTY)
    assert (line.text, line.confidence) == ("a", 0.5)
    np.testing.assert_allclose(line.polygon, box(8, 18, 32, 32), atol=1e-4)
    assert line.polygon.dtype == np.float32
    # Cut out with 200 / 60 more on every side: 26.7 by 16.7, so 48 high and 76.8 wide, of which 0.6.
    assert [crop.shape[3] for crop in models.crops] == [48]
    (wide,) = looking(models, polygon_unclip=0.0, crop_unclip=0.0, small_squeeze=1.0).read_picture(SIXTY)
    assert polygons([wide]) == [box(10, 20, 30, 30).tolist()]
    assert models.crops[1].shape[3] == 96


def test_polygons_end_with_the_picture() -> None:
    models = Models([(0, 0, 70, 80)])
    (line,) = looking(models).read_picture(np.zeros((80, 70, 3), np.uint8))
    assert polygons([line]) == [box(0, 0, 70, 80).tolist()]
    corner = looking(Models([(60, 64, 70, 80)])).read_picture(np.zeros((80, 70, 3), np.uint8))
    assert corner[0].polygon.max(0).tolist() == [70, 80]
    assert corner[0].polygon.min(0).tolist() == pytest.approx([60 - 0.6 * 160 / 52, 64 - 0.6 * 160 / 52], abs=1e-4)


@pytest.mark.parametrize(("shape", "width"), [((64, 127), 58), ((127, 64), 58), ((64, 128), 96), ((128, 64), 96)])
def test_small_is_what_has_a_longer_side_below_the_bound(shape: tuple[int, int], width: int) -> None:
    models = Models([(10, 20, 30, 30)])
    looking(models, crop_unclip=0.0).read_picture(np.full((*shape, 3), 255, np.uint8))
    assert int((models.crops[0][0, 0, 0] == 1).sum()) == width


def test_a_picture_of_two_pixels_may_be_small_too() -> None:
    models = Models([(0, 0, 2, 2)])
    looking(models, crop_unclip=0.0, det_min_side=1, small_side=3).read_picture(np.full((2, 2, 3), 255, np.uint8))
    assert int((models.crops[0][0, 0, 0] == 1).sum()) == 29  # 0.6 of 48


def test_upright_text_is_read_from_the_top_right_down() -> None:
    picture = NOISE[:128, :128]
    upright, lying = box(20, 30, 40, 60), box(20, 30, 41, 60)
    for core, turned in ((upright, True), (lying, False)):
        x0, y0, x1, y1 = core[[0, 2]].astype(int).ravel()
        models = Models([(x0, y0, x1, y1)])
        (line,) = looking(models, crop_unclip=0.0, polygon_unclip=0.0).read_picture(picture)
        assert polygons([line]) == [(np.roll(core, -1, axis=0) if turned else core).tolist()]
        assert _sides(line.polygon) == ((30.0, 20.0) if turned else (21.0, 30.0))


def test_lines_come_in_reading_order() -> None:
    models = Models([(40, 10, 60, 20), (5, 12, 25, 22), (5, 40, 25, 50)])
    lines = looking(models, polygon_unclip=0.0).read_picture(SIXTY)
    assert [line.polygon[0].tolist() for line in lines] == [[5, 12], [40, 10], [5, 40]]


def test_words_take_their_columns_of_the_polygon() -> None:
    """Grown for reading by 1.0 * 800 / 120 and for the polygon by half of that, both to either side of the core."""
    read = np.eye(3, dtype=np.float32)[[0, 1, 0, 2, 0, 1, 1, 2, 0, 1]]
    models = Models([(10, 25, 50, 45)], read)
    lines = looking(models, word_boxes=True, polygon_unclip=0.5, small_squeeze=1.0).read_picture(SIXTY)
    crop, shown = 800 / 120, 400 / 120
    length, width = 40 + 2 * crop, 77  # 48 * 53.3 / 33.3, rounded up
    assert [line.text for line in lines] == ["a", "a", "a"]
    # Five characters between the columns 1 and 9: half of one is 1 column, and half a column's width.
    for line, column in zip(lines, (1.5, 5.5, 9.5), strict=True):
        ends = (10 - crop + 8 * c / width * length for c in (column - 1.5, column + 1.5))
        x0, x1 = (float(np.clip(end, 10 - shown, 50 + shown)) for end in ends)
        np.testing.assert_allclose(line.polygon, box(x0, 25 - shown, x1, 45 + shown), atol=1e-3)


@pytest.mark.parametrize(("text", "half"), [("_a", 0.5), ("a__b", 1.5 + 0.5), ("a_b_a", 1.5), (" a", 0.5 + 0.5)])
def test_a_character_reaches_half_way_to_the_next(text: str, half: float) -> None:
    letters = "_ab "
    read = np.zeros((len(text), 4), np.float32)
    for i, one in enumerate(text):
        read[i, letters.index(one)] = 0.25 + 0.125 * i
    kept = [i for i, one in enumerate(text) if one not in "_ "]
    ((found, confidence, start, end),) = _decode(read, letters, True)
    assert found == text.replace("_", "").strip()
    assert confidence == pytest.approx(np.mean([0.25 + 0.125 * i for i in kept]))
    assert (start, end) == (kept[0] + 0.5 - half, kept[-1] + 0.5 + half)
    assert type(confidence) is float
    ((_, whole, *ends),) = _decode(read, letters, False)
    assert type(whole) is float
    assert ends == [0.0, len(text)]


def test_rows_are_told_apart_by_half_a_height() -> None:
    def ordered(*boxes: np.ndarray) -> list[int]:
        found = in_reading_order(boxes)
        return [next(i for i, one in enumerate(boxes) if one is each) for each in found]

    assert ordered(box(30, 0, 40, 10), box(0, 4, 10, 14)) == [1, 0]
    assert ordered(box(30, 0, 40, 10), box(0, 5, 10, 15)) == [0, 1]  # by half a height: the next row
    # A row is as high as its first box, and begins at it: 4 and then 4 more is another row.
    assert ordered(box(60, 0, 70, 10), box(30, 4, 40, 14), box(0, 8, 10, 18)) == [1, 0, 2]
    # Of boxes at one height the left one is the first.
    assert ordered(box(60, 10, 70, 40), box(30, 20, 40, 30), box(0, 27, 10, 37)) == [1, 0, 2]
    assert ordered(box(30, 20, 40, 30), box(60, 10, 70, 40), box(0, 27, 10, 37)) == [0, 1, 2]
    # Three rows, each looked up by its own first box.
    rows = [box(30, 0, 40, 10), box(30, 20, 40, 30), box(30, 40, 40, 50), box(0, 41, 10, 51), box(0, 21, 10, 31)]
    assert ordered(*rows) == [0, 4, 1, 3, 2]
    assert in_reading_order([]) == []


class Session:
    """What an onnx session was made with, and characters of its own."""

    made: ClassVar[list[tuple[Any, ...]]] = []

    def __init__(self, path: Any, options: Any, providers: Any) -> None:
        self.made.append((path, options, providers))

    def get_outputs(self) -> list[Any]:
        return [SimpleNamespace(shape=[1] * (4 if "_det_" in self.made[-1][0] else 3))]

    def get_modelmeta(self) -> Any:
        return SimpleNamespace(custom_metadata_map={"character": "a\nb"})


def test_models_are_loaded_once_on_one_thread_each(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[Any, ...]] = []
    monkeypatch.setattr(Session, "made", made)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    reader = OcrEngine()
    assert made == []
    assert reader.alphabet() == ["a", "b", " "]
    assert reader._load()[2] == ["", "a", "b", " "]
    assert [path for path, _, _ in made] == [str(path) for path in _model_files(OcrConfig())]
    assert [type(path) for path, _, _ in made] == [str, str]
    for _, options, providers in made:
        assert (options.intra_op_num_threads, options.inter_op_num_threads) == (1, 1)
        assert options.log_severity_level == 4
        assert providers == ["CPUExecutionProvider"]


def test_models_are_the_last_by_name_or_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    names = [f"v{i}_{kind}_small.onnx" for i in (3, 1, 2, 4) for kind in ("det", "rec")]
    for name in [*names, "v9_cls_small.onnx", "v9_det_small.txt"]:
        (tmp_path / "models" / name).touch()
    asked: list[str] = []
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(room.importlib.util, "find_spec", lambda name: asked.append(name) or spec)
    assert _model_files(OcrConfig()) == (
        tmp_path / "models" / "v4_det_small.onnx",
        tmp_path / "models" / "v4_rec_small.onnx",
    )
    assert asked == ["rapidocr"]
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.onnx").touch()
    assert [path.name for path in _model_files(OcrConfig(rec_model="~/own.onnx"))] == ["v4_det_small.onnx", "own.onnx"]
    assert _model_files(OcrConfig(det_model="~/own.onnx"))[0] == tmp_path / "own.onnx"
    nowhere = SimpleNamespace(submodule_search_locations=[str(tmp_path / "none")])
    for found in (None, nowhere):
        monkeypatch.setattr(room.importlib.util, "find_spec", lambda name, found=found: found)
        with pytest.raises(FileNotFoundError) as raised:
            _model_files(OcrConfig())
        assert str(raised.value) == "no det model: none in the package rapidocr"
    monkeypatch.setattr(room.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(FileNotFoundError) as raised:
        _model_files(OcrConfig(det_model="~/own.onnx", rec_model=str(tmp_path)))
    assert str(raised.value) == f"no rec model: {tmp_path}"


@pytest.mark.parametrize("by_word", [False, True])
def test_confidences_are_means_in_double_precision(by_word: bool) -> None:
    sure = np.array([0.1, 0.2, 0.7], np.float32)
    read = np.zeros((3, 4), np.float32)
    read[[0, 1, 2], [1, 2, 1]] = sure
    ((_, confidence, *_),) = _decode(read, "_ab ", by_word)
    assert confidence == pytest.approx(sum(map(float, sure)) / 3, rel=1e-14)
    assert confidence != float(sure.mean())
