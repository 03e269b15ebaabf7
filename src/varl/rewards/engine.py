"""Reading the text of pictures: rapidocr's PP-OCR detector and recogniser, run straight on onnxruntime.

Why not call ``rapidocr.RapidOCR``: its defaults blow a 64x64 picture up to 736x736 and pad a word to 48x320,
some 50 times the work that such a picture needs, and its postprocessing rounds polygons to whole pixels. Here
a small picture is detected at its own size (rounded up to multiples of 32) and a word is recognised in the
narrowest of a few fixed widths. Each picture and each line runs alone, as a batch of one on one thread:
batching gains next to nothing at these sizes, and so a picture reads the same, to the bit, whatever else is
in its batch. Parallelism is over pictures.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import torch
from torch import Tensor

from varl.rewards.base import Polygon
from varl.run_config import MOST_THREADS

__all__ = ["Line", "OcrConfig", "OcrEngine", "Reading", "TextReader", "Unread", "to_pixels"]

_STRIDE = 32  # the detector's input sides are multiples of this
_HEIGHT = 48  # the recogniser's input height
_COLUMN = 8  # pixels of the recogniser's input a step of its output covers
_MOST_SIDE, _MOST_UNCLIP = 16384, 10  # pixels; and detectors are trained for 1.5 to 2
_WIDTHS = (48, 64, 80, 96, 112, 128, 160, 192, 256, 320, 480, 640, 960, 1280, 1920)


@dataclass(frozen=True)
class OcrConfig:
    """Settings of the engine; plain numbers, so that they can be pickled and written into a recipe.

    Attributes:
        threads: pictures read at once (each on one core).
        small_side: a picture whose longer side is less than this, in pixels, counts as small.
        det_side_limit: larger pictures are shrunk for the detector until their longer side is this, in
            pixels.
        det_min_side: smaller pictures are enlarged for the detector until their shorter side is this, in
            pixels.
        det_thresh: probability above which a pixel is text, in (0, 1).
        box_thresh: mean probability that a detected line must have, in [0, 1).
        polygon_unclip: how far the detector's shrunken core of a line is grown to give the polygon that is
            reported, in units of area / perimeter. The default fits letters closely (the engine's own 1.6
            does not).
        crop_unclip: the same for the cut-out that is recognised, which wants a margin.
        small_squeeze: lines of small pictures are squeezed to this share of their width before they are
            recognised; the recogniser's time goes with the width. Short words in capitals lose nothing at 0.6,
            long ones in lower case 1 or 2 in a hundred, hence only small pictures.
        word_boxes: report each word with a confidence and polygon of its own, from the recogniser's columns;
            False: a line as a whole (users split it at white space, and each word inherits the line's
                confidence).
        det_model, rec_model: paths of other onnx models of the same kinds; None for those in rapidocr's
            package.
    """

    threads: int = 1
    small_side: int = 128
    det_side_limit: int = 960
    det_min_side: int = 64
    det_thresh: float = 0.3
    box_thresh: float = 0.5
    polygon_unclip: float = 0.6
    crop_unclip: float = 1.0
    small_squeeze: float = 0.6
    word_boxes: bool = False
    det_model: str | None = None
    rec_model: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.threads <= MOST_THREADS:
            raise ValueError(f"threads must be from 1 to {MOST_THREADS}, got {self.threads}")
        if not 1 <= self.det_min_side <= self.det_side_limit <= _MOST_SIDE:
            got = f"{self.det_min_side} and {self.det_side_limit}"
            raise ValueError(f"need 1 <= det_min_side <= det_side_limit <= {_MOST_SIDE}, got {got}")
        if not all(0 <= by <= _MOST_UNCLIP for by in (self.polygon_unclip, self.crop_unclip)):
            got = f"{self.polygon_unclip} and {self.crop_unclip}"
            raise ValueError(f"polygon_unclip and crop_unclip must be from 0 to {_MOST_UNCLIP}, got {got}")
        if not 0 < self.det_thresh < 1 or not 0 <= self.box_thresh < 1:
            raise ValueError(f"thresholds lie in (0, 1), got {self.det_thresh} and {self.box_thresh}")
        if not 0 < self.small_squeeze <= 1:
            raise ValueError(f"small_squeeze must be in (0, 1], got {self.small_squeeze}")


@dataclass(frozen=True)
class Line:
    """A line of text (or a word, with ``word_boxes``) found in a picture.

    Attributes:
        text: as read; never blank.
        confidence: mean probability of its characters, in [0, 1].
        polygon: float32 [4, 2], (x, y) in pixels of the picture, clockwise from where reading starts (top
            left).
    """

    text: str
    confidence: float
    polygon: Polygon


@dataclass(frozen=True)
class Unread:
    """Stands for the reading of a picture that could not be read, and says why."""

    reason: str


Reading = list[Line] | Unread
"""What was read in a picture: its lines from top to bottom (none if it holds no text), or why it was not read."""


class TextReader(Protocol):
    """What ``OcrReward`` needs of an engine, in this process or another."""

    def read(self, images: Tensor) -> list[Reading]: ...

    def describe(self) -> dict[str, str]: ...


def to_pixels(images: Tensor) -> list[np.ndarray | Unread]:
    """[B, 3, H, W] in [0, 1] to B pictures uint8 [H, W, 3] (RGB); ``Unread`` where one has a non-finite value.

    Raises:
        ValueError: if ``images`` has another shape.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be [batch, 3, height, width], got {tuple(images.shape)}")
    images = images.detach().float()
    finite = images.isfinite().flatten(1).all(1).tolist()
    pixels = (images.nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    bad = Unread("the picture has a value that is not finite")
    return [np.ascontiguousarray(p) if ok else bad for p, ok in zip(pixels, finite, strict=True)]


class OcrEngine:
    """Detects and recognises lines of text, in this process. The models are loaded at the first reading.

    One object may be used from several threads, and can be pickled (its models are loaded anew).

    Raises:
        FileNotFoundError: if a model is missing.
    """

    def __init__(self, config: OcrConfig | None = None) -> None:
        self.config = config or OcrConfig()
        _model_files(self.config)
        self._lock = threading.Lock()
        self._models: tuple[Any, Any, list[str]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["config"])  # type: ignore[misc]

    def describe(self) -> dict[str, str]:
        """Engine, versions, model files and all settings that bear on what is read."""
        det, rec = _model_files(self.config)
        apart = ("threads", "det_model", "rec_model")
        return {
            "engine": "rapidocr models, varl reader",
            "version": importlib.metadata.version("rapidocr"),
            "runtime": f"onnxruntime {importlib.metadata.version('onnxruntime')}",
            "det_model": det.name,
            "rec_model": rec.name,
            "settings": ", ".join(f"{k}={v}" for k, v in asdict(self.config).items() if k not in apart),
        }

    def read(self, images: Tensor) -> list[Reading]:
        """Read [B, 3, H, W] pictures in [0, 1]; a picture that raises is ``Unread``, the others are not
        affected.

        Raises:
            ValueError: if ``images`` has another shape.
        """
        pictures = to_pixels(images)
        if self.config.threads == 1 or len(pictures) < 2:
            return [self._read_safely(p) for p in pictures]
        with ThreadPoolExecutor(self.config.threads) as pool:
            return list(pool.map(self._read_safely, pictures))

    def _read_safely(self, picture: np.ndarray | Unread) -> Reading:
        if isinstance(picture, Unread):
            return picture
        try:
            return self.read_picture(picture)
        except Exception as error:
            return Unread(f"{type(error).__name__}: {error}")

    def read_picture(self, picture: np.ndarray) -> list[Line]:
        """Read one picture, uint8 [H, W, 3] RGB. Raises what the engine raises."""
        detector, recogniser, characters = self._load()
        bgr = np.ascontiguousarray(picture[..., ::-1])  # the models were trained on BGR
        size = np.array([bgr.shape[1], bgr.shape[0]], np.float32)
        squeeze = self.config.small_squeeze if max(bgr.shape[:2]) < self.config.small_side else 1.0
        lines = []
        for core in in_reading_order(self._detect(detector, bgr)):
            if np.divide(*_sides(_grow(core, self.config.crop_unclip))) <= 1 / 1.5:
                # Upright text is turned as rapidocr does: reading starts at the top right.
                core = np.roll(core, -1, axis=0)
            box, polygon = _grow(core, self.config.crop_unclip), _grow(core, self.config.polygon_unclip)
            crop, width = _cut_out(bgr, box, squeeze)
            name = recogniser.get_inputs()[0].name
            probabilities = recogniser.run(None, {name: crop})[0][0]  # [steps, characters], softmax included
            for text, confidence, start, end in _decode(probabilities, characters, self.config.word_boxes):
                part = polygon
                if self.config.word_boxes:
                    # Columns count along the cut-out, which is longer than the polygon.
                    length, shorter = _sides(box)[0], _sides(polygon)[0]
                    along = np.array([start, end]) * _COLUMN / width * length - (length - shorter) / 2
                    part = _part(polygon, *(along / shorter).clip(0, 1))
                lines.append(Line(text, confidence, part.clip(0, size)))
        return lines

    def _load(self) -> tuple[Any, Any, list[str]]:
        with self._lock:
            if self._models is None:
                det, rec = _model_files(self.config)
                # A map [batch, 1, H, W], and probabilities [batch, steps, characters].
                detector, recogniser = _session(det, 4), _session(rec, 3)
                alphabet = recogniser.get_modelmeta().custom_metadata_map.get("character", "").splitlines()
                if not alphabet:
                    raise ValueError(f"{rec} names no characters in its metadata")
                self._models = detector, recogniser, ["", *alphabet, " "]
            return self._models

    def alphabet(self) -> list[str]:
        """The characters that the recogniser can read."""
        return [character for character in self._load()[2] if character]

    def _detect(self, detector: Any, bgr: np.ndarray) -> list[np.ndarray]:
        """The shrunken cores of the lines, float32 [4, 2] in pixels of the picture."""
        height, width = bgr.shape[:2]
        scale = max(1.0, self.config.det_min_side / min(height, width))
        scale = min(scale, self.config.det_side_limit / max(height, width))
        h, w = max(1, round(height * scale)), max(1, round(width * scale))
        if (h, w) != (height, width):
            bgr = cv2.resize(bgr, (w, h), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
        bgr = cv2.copyMakeBorder(bgr, 0, -h % _STRIDE, 0, -w % _STRIDE, cv2.BORDER_REPLICATE)
        name = detector.get_inputs()[0].name
        probability = detector.run(None, {name: _normalise(bgr)})[0][0, 0][:h, :w]
        back = np.array([width / w, height / h], np.float32)
        return [core * back for core in find_cores(probability, self.config.det_thresh, self.config.box_thresh)]


def _model_files(config: OcrConfig) -> tuple[Path, Path]:
    """The detector's and the recogniser's file: those configured, or the last by name in rapidocr's package.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    spec = importlib.util.find_spec("rapidocr")
    places = spec.submodule_search_locations if spec else None
    found = []
    for own, kind in ((config.det_model, "det"), (config.rec_model, "rec")):
        files = sorted(Path(places[0], "models").glob(f"*_{kind}_*.onnx")) if places else []
        path = Path(os.path.expanduser(own)) if own else files[-1] if files else None
        if path is None or not path.is_file():
            raise FileNotFoundError(f"no {kind} model: {path or 'none in the package rapidocr'}")
        found.append(path)
    return found[0], found[1]


def _session(path: Path, sides: int) -> Any:
    """A model whose output has so many sides, ready to run; a ValueError names the file where it is none."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        found = len(session.get_outputs()[0].shape)
    except Exception as error:  # onnxruntime's own, of a dozen kinds
        raise ValueError(f"{path} is no ONNX model: {' '.join(str(error).split())[:200]}") from error
    if found != sides:
        raise ValueError(f"{path} is a model of another kind: its output has {found} sides, not {sides}")
    return session


def _normalise(bgr: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] to float32 [1, 3, H, W] in [-1, 1]."""
    return np.ascontiguousarray((bgr.astype(np.float32) / 127.5 - 1).transpose(2, 0, 1)[None])


def find_cores(probability: np.ndarray, thresh: float, box_thresh: float) -> list[np.ndarray]:
    """Lines in a detector's map float32 [H, W]: the rectangle around each blob of text, float32 [4, 2],
    corners clockwise from the top left, in pixels whose edges (not centres) are whole numbers."""
    contours, _ = cv2.findContours((probability > thresh).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    cores = []
    for contour in contours:
        x, y, w, h = cv2.boundingRect(contour)
        if min(w, h) < 2:
            continue
        inside = np.zeros((h, w), np.uint8)
        cv2.drawContours(inside, [contour - np.array([x, y], contour.dtype)], -1, 1, -1)
        if cv2.mean(probability[y : y + h, x : x + w], inside)[0] < box_thresh:
            continue
        (cx, cy), (rw, rh), angle = cv2.minAreaRect(contour)
        corners = cv2.boxPoints(((cx + 0.5, cy + 0.5), (rw + 1, rh + 1), angle))
        by_x = corners[np.argsort(corners[:, 0], kind="stable")]
        left = by_x[:2][np.argsort(by_x[:2, 1], kind="stable")]
        right = by_x[2:][np.argsort(by_x[2:, 1], kind="stable")]
        cores.append(np.stack([left[0], right[0], right[1], left[1]]).astype(np.float32))
    return cores


def _sides(box: np.ndarray) -> tuple[float, float]:
    """Width and height of a rectangle [4, 2]."""
    return float(np.linalg.norm(box[1] - box[0])), float(np.linalg.norm(box[3] - box[0]))


def _grow(box: np.ndarray, ratio: float) -> np.ndarray:
    """The rectangle with every side moved outward by ``ratio`` * area / perimeter, as DB's unclip does."""
    w, h = _sides(box)
    by = ratio * w * h / (2 * (w + h))
    across, down = (box[1] - box[0]) / w * by, (box[3] - box[0]) / h * by
    return (box + np.stack([-across - down, across - down, across + down, down - across])).astype(np.float32)


def _cut_out(bgr: np.ndarray, box: np.ndarray, squeeze: float) -> tuple[np.ndarray, int]:
    """The recogniser's input float32 [1, 3, 48, W] for a rectangle of the picture, and the width that it
    fills."""
    w, h = _sides(box)
    exact = _HEIGHT * w / h * squeeze
    room = next((width for width in _WIDTHS if width >= exact), _WIDTHS[-1])
    width = max(_COLUMN, min(room, int(np.ceil(exact))))
    if h > 2 * _HEIGHT:  # shrink first, or the warp would skip pixels
        factor = _HEIGHT / h
        small = cv2.resize(bgr, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
        box = box * (np.array([small.shape[1], small.shape[0]]) / np.array([bgr.shape[1], bgr.shape[0]]))
        bgr = small
    target = np.array([[0, 0], [width, 0], [0, _HEIGHT]], np.float32)
    # The shift: OpenCV's coordinates count from pixel centres.
    warp = cv2.getAffineTransform(box[[0, 1, 3]].astype(np.float32) - 0.5, target - 0.5)
    size = (width, _HEIGHT)
    crop = cv2.warpAffine(bgr, warp, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    padded = np.zeros((1, 3, _HEIGHT, room), np.float32)
    padded[..., :width] = _normalise(crop)
    return padded, width


def _decode(
    probabilities: np.ndarray, characters: Sequence[str], by_word: bool
) -> list[tuple[str, float, float, float]]:
    """CTC's best path: (text, mean probability, first column, column after the last), nothing for blank
    text."""
    best = probabilities.argmax(1)
    kept = best != 0
    kept[1:] &= best[1:] != best[:-1]
    where = np.flatnonzero(kept)
    read = [(characters[best[i]], float(probabilities[i, best[i]]), int(i)) for i in where]
    if not "".join(c for c, _, _ in read).strip():
        return []
    if not by_word:
        text = "".join(c for c, _, _ in read)
        return [(text.strip(), float(np.mean([p for _, p, _ in read])), 0.0, float(len(best)))]
    # Words reach half a character beyond the columns where their outer characters fired.
    half = (read[-1][2] - read[0][2]) / max(1, len(read) - 1) / 2 + 0.5
    words: list[list[tuple[str, float, int]]] = [[]]
    for item in read:
        if item[0].isspace():
            words.append([])
        else:
            words[-1].append(item)
    found = []
    for word in filter(None, words):
        text, confidence = "".join(c for c, _, _ in word), float(np.mean([p for _, p, _ in word]))
        found.append((text, confidence, word[0][2] + 0.5 - half, word[-1][2] + 0.5 + half))
    return found


def _part(box: np.ndarray, start: float, end: float) -> np.ndarray:
    """The part of a line's rectangle between two shares of its length."""
    top, bottom = box[1] - box[0], box[2] - box[3]
    corners = [box[0] + start * top, box[0] + end * top, box[3] + end * bottom, box[3] + start * bottom]
    return np.stack(corners).astype(np.float32)


def in_reading_order(boxes: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Rectangles [4, 2] row by row from the top, left to right in a row; boxes whose centres differ by less
    than half a height are of one row."""
    rows: list[list[np.ndarray]] = []
    for box in sorted(boxes, key=lambda b: (float(b[:, 1].mean()), float(b[:, 0].mean()))):
        if rows and box[:, 1].mean() - rows[-1][0][:, 1].mean() < 0.5 * np.ptp(rows[-1][0][:, 1]):
            rows[-1].append(box)
        else:
            rows.append([box])
    return [box for row in rows for box in sorted(row, key=lambda b: float(b[:, 0].mean()))]
