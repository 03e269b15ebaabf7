"""The engine reads what is there, says where, and reads a picture the same whatever is read beside it."""

from __future__ import annotations

import pickle
import random
import re

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from varl.policy import Prompt
from varl.rewards.engine import Line, OcrConfig, OcrEngine, Unread, _decode, _model_files, in_reading_order
from varl.rewards.ocr import OcrReward
from varl.rewards.worker import OcrWorker

from .rendering import Picture, draw, draw_many, font, stack


@pytest.fixture(scope="module")
def engine() -> OcrEngine:
    return OcrEngine()


@pytest.fixture(scope="module")
def pictures() -> list[Picture]:
    return draw_many(24)


@pytest.fixture(scope="module")
def readings(engine: OcrEngine, pictures: list[Picture]) -> list[list[Line]]:
    return engine.read(stack(pictures))


def same(a: list[Line], b: list[Line]) -> bool:
    return [(x.text, x.confidence) for x in a] == [(x.text, x.confidence) for x in b] and all(
        np.array_equal(x.polygon, y.polygon) for x, y in zip(a, b, strict=True)
    )


def iou(polygon: np.ndarray, box: tuple[int, int, int, int]) -> float:
    """Of the polygon's axis-parallel hull and a box."""
    (x0, y0), (x1, y1) = polygon.min(0), polygon.max(0)
    w, h = min(x1, box[2]) - max(x0, box[0]), min(y1, box[3]) - max(y0, box[1])
    both = max(0.0, w) * max(0.0, h)
    return both / ((x1 - x0) * (y1 - y0) + (box[2] - box[0]) * (box[3] - box[1]) - both)


def test_reads_words_of_small_pictures_in_order(readings, pictures):
    wanted = [[word.lower() for word in picture.words] for picture in pictures]
    read = [[line.text.lower() for line in lines] for lines in readings]
    right = sum(w == r for w, r in zip(wanted, read, strict=True))
    assert right >= 22, [(w, r) for w, r in zip(wanted, read, strict=True) if w != r]
    assert all(0.5 < line.confidence <= 1 for lines in readings for line in lines)


def test_polygons_lie_closely_on_the_text(readings, pictures):
    overlaps = [
        iou(line.polygon, box)
        for lines, picture in zip(readings, pictures, strict=True)
        if len(lines) == len(picture.boxes)
        for line, box in zip(lines, picture.boxes, strict=True)
    ]
    assert len(overlaps) > 40
    assert np.mean(overlaps) > 0.75
    assert np.quantile(overlaps, 0.1) > 0.65
    line = readings[0][0]
    assert line.polygon.dtype == np.float32
    assert line.polygon.shape == (4, 2)


def test_reading_does_not_depend_on_the_batch(engine, readings, pictures):
    backward = engine.read(stack(pictures[::-1][:9]))
    alone = engine.read(pictures[5].image[None])
    assert all(same(a, b) for a, b in zip(backward, readings[::-1], strict=False))
    assert same(alone[0], readings[5])


def test_threads_do_not_change_the_reading(readings, pictures):
    assert all(
        same(a, b) for a, b in zip(OcrEngine(OcrConfig(threads=2)).read(stack(pictures[:9])), readings, strict=False)
    )


def test_empty_pictures_have_no_lines(engine):
    assert engine.read(torch.tensor([0.0, 0.5, 1.0])[:, None, None, None].expand(3, 3, 64, 64)) == [
        [],
        [],
        [],
    ]
    assert engine.read(torch.zeros(0, 3, 64, 64)) == []


@pytest.mark.parametrize(("height", "width"), [(40, 150), (256, 320), (1024, 1024)])
def test_reads_other_sizes(height, width):
    engine = OcrEngine(OcrConfig(det_side_limit=512))
    image = Image.new("RGB", (width, height), (200, 220, 240))
    place, size = (width // 10, height // 4), height // 4
    ImageDraw.Draw(image).text(place, "SALE", font=font("DejaVuSans-Bold", size), fill=(90, 20, 20))
    (lines,) = engine.read(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255)
    assert [line.text for line in lines] == ["SALE"]
    left, top, right, bottom = font("DejaVuSans-Bold", size).getbbox("SALE")
    box = (place[0] + left, place[1] + top, place[0] + right, place[1] + bottom)
    assert iou(lines[0].polygon, tuple(int(v) for v in box)) > 0.7


def test_slanted_text_has_a_slanted_polygon(engine):
    image = Image.new("RGB", (256, 256), (240, 240, 240))
    ImageDraw.Draw(image).text((50, 105), "HOTEL", font=font("DejaVuSans-Bold", 44), fill=(0, 0, 120))
    image = image.rotate(60, fillcolor=(240, 240, 240))
    (lines,) = engine.read(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255)
    assert [line.text for line in lines] == ["HOTEL"]
    run, fall = lines[0].polygon[1] - lines[0].polygon[0]
    assert np.degrees(np.arctan2(-fall, run)) == pytest.approx(60, abs=4)


def test_word_boxes_split_a_line():
    image = Image.new("RGB", (320, 256), (250, 250, 240))
    face = font("DejaVuSans-Bold", 36)
    ImageDraw.Draw(image).text((20, 100), "GRAND SALE", font=face, fill=(0, 0, 0))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    (line,) = OcrEngine().read(pixels)[0]
    assert line.text == "GRAND SALE"
    words = OcrEngine(OcrConfig(word_boxes=True)).read(pixels)[0]
    assert [word.text for word in words] == ["GRAND", "SALE"]
    assert np.mean([words[0].confidence, words[1].confidence]) == pytest.approx(line.confidence, abs=0.05)
    gap = 20 + face.getlength("GRAND "), 20 + face.getlength("GRAND")
    assert words[0].polygon[1, 0] == pytest.approx(gap[1], abs=3)
    assert words[1].polygon[0, 0] == pytest.approx(gap[0], abs=2.5)
    for word, (x0, x1) in zip(words, [(20, gap[1]), (gap[0], 20 + face.getlength("GRAND SALE"))], strict=True):
        _, top, _, bottom = face.getbbox("GRAND")
        assert iou(word.polygon, (int(x0), 100 + int(top), int(x1), 100 + int(bottom))) > 0.7


def test_decoding_collapses_repeats_and_drops_blanks():
    columns = ["a", "a", "", "a", " ", "", "b"]  # the best path; blanks separate true repeats
    alphabet = ["", "a", "b", " "]
    sure = [0.9, 0.3, 0.5, 0.7, 0.8, 0.5, 0.6]
    probabilities = np.zeros((len(columns), len(alphabet)), np.float32)
    for i, (character, p) in enumerate(zip(columns, sure, strict=True)):
        probabilities[i, alphabet.index(character)] = p
    ((text, confidence, start, end),) = _decode(probabilities, alphabet, by_word=False)
    assert (text, start, end) == ("aa b", 0, 7)
    assert confidence == pytest.approx((0.9 + 0.7 + 0.8 + 0.6) / 4)
    words = _decode(probabilities, alphabet, by_word=True)
    assert [(w[0], pytest.approx(w[1])) for w in words] == [("aa", 0.8), ("b", 0.6)]
    assert words[0][2] < 0.5 < 3.5 < words[0][3] <= words[1][2] < 6.5 < words[1][3]
    assert _decode(np.eye(4, dtype=np.float32)[[0, 3, 0]], alphabet, by_word=False) == []


def test_a_broken_picture_is_unread_and_no_other(engine, pictures, readings):
    images = stack(pictures[:3])
    images[1, 0, 5, 5] = float("nan")
    first, second, third = engine.read(images)
    assert second == Unread("the picture has a value that is not finite")
    assert same(first, readings[0])
    assert same(third, readings[2])


def test_an_exception_leaves_the_other_pictures_read(pictures, readings, monkeypatch):
    engine = OcrEngine()
    read_picture = engine.read_picture
    calls = []

    def second_raises(picture):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of ink")
        return read_picture(picture)

    monkeypatch.setattr(engine, "read_picture", second_raises)
    first, second, third = engine.read(stack(pictures[:3]))
    assert second == Unread("RuntimeError: out of ink")
    assert same(first, readings[0])
    assert same(third, readings[2])


def test_wrong_shapes_are_refused(engine):
    with pytest.raises(ValueError, match=r"\[batch, 3, height, width\]"):
        engine.read(torch.zeros(3, 64, 64))
    with pytest.raises(ValueError, match=r"\[batch, 3, height, width\]"):
        engine.read(torch.zeros(1, 1, 64, 64))


def test_engine_pickles_and_describes_itself(engine):
    copy = pickle.loads(pickle.dumps(OcrEngine(OcrConfig(box_thresh=0.4))))
    assert copy.config.box_thresh == 0.4
    said = copy.describe()
    assert said["det_model"].endswith(".onnx")
    assert said["rec_model"].endswith(".onnx")
    assert "box_thresh=0.4" in said["settings"]
    assert all(isinstance(v, str) for v in said.values())


def test_a_missing_model_is_named():
    with pytest.raises(FileNotFoundError, match=r"/nowhere/det\.onnx"):
        OcrEngine(OcrConfig(det_model="/nowhere/det.onnx"))


@pytest.mark.parametrize("name", ["det_model", "rec_model"])
def test_a_model_that_is_none_is_named_before_the_run(tmp_path, name):
    text = tmp_path / "model.onnx"
    text.write_text("no model")
    others = dict(zip(("rec_model", "det_model"), map(str, _model_files(OcrConfig())), strict=True))
    for path, reason in ((str(text), "is no ONNX model: "), (others[name], "is a model of another kind: its output")):
        for reader in (OcrEngine, OcrWorker):
            with pytest.raises(ValueError, match=rf"^{re.escape(path)} {reason}"):
                OcrReward(reader(OcrConfig(**{name: path}))).check([Prompt(words=("KEBA",))])


@pytest.mark.parametrize(
    "bad",
    [{"threads": 0}, {"det_min_side": 2000}, {"det_thresh": 1.5}, {"box_thresh": -1}, {"small_squeeze": 0}],
)
def test_bad_settings_are_refused(bad):
    with pytest.raises(ValueError, match=r"must|need|lie"):
        OcrConfig(**bad)


def test_reading_order_is_by_row_then_column():
    def box(x, y):
        return np.array([[x, y], [x + 20, y], [x + 20, y + 10], [x, y + 10]], np.float32)

    boxes = [box(30, 2), box(0, 0), box(0, 20), box(40, 18)]
    random.Random(0).shuffle(boxes)
    assert [tuple(b[0]) for b in in_reading_order(boxes)] == [(0, 0), (30, 2), (0, 20), (40, 18)]


def test_text_at_the_very_edge_is_read(engine):
    rng = random.Random(4)
    picture = draw(["CAFE"], rng)
    left, top, _, _ = picture.boxes[0]
    corner = picture.image.roll((-top, -left), (1, 2))
    (lines,) = engine.read(corner[None])
    assert [line.text.lower() for line in lines] == ["cafe"]
