"""Small values of the rewards' room, each to the letter: what is logged, described, decoded and refused."""

from __future__ import annotations

import importlib.metadata
import logging
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from signatures import defaults
from varl.rewards import base, engine, folding, host, load_reward, ocr, process, python, scoring, worker
from varl.rewards.base import FailureLog
from varl.rewards.engine import OcrConfig, OcrEngine, _decode, _model_files, to_pixels
from varl.rewards.guard import undisturbed
from varl.rewards.ocr import OcrReward
from varl.rewards.python import import_callable


def test_a_warning_says_where_if_that_is_known(caplog: pytest.LogCaptureFixture) -> None:
    log = FailureLog("reward a:b", most=2)
    with caplog.at_level(logging.WARNING):
        log.add("one", 2, "a.py, line 3")
        log.add("two")
        log.add("three")
        log.add("one")
        log.add("four", 5)
    start = "reward a:b: pictures failed and are left out, not scored 0: "
    assert [record.message for record in caplog.records] == [
        start + "one (a.py, line 3)",
        start + "two",
        start + "other",
    ]
    assert log.reasons == {"one": 3, "two": 1, "other": 6}
    assert log.total == 10


def columns(text: str, characters: str, certain: float = 0.9) -> np.ndarray:
    """Probabilities under which a recogniser reads a text, a character a column; ``_`` is its blank."""
    found = np.full((len(text), len(characters)), (1 - certain) / (len(characters) - 1), np.float32)
    for column, character in enumerate(text):
        found[column, characters.index(character)] = certain
    return found


LETTERS = "_ab "


@pytest.mark.parametrize("by_word", [False, True])
@pytest.mark.parametrize("text", ["_", " ", "  ", " _ ", "_ _ _"])
def test_blank_text_is_none(text: str, by_word: bool) -> None:
    assert _decode(columns(text, LETTERS), LETTERS, by_word) == []


def test_a_line_is_decoded_as_a_whole_or_by_its_words() -> None:
    read = columns(" aa_a_b_ b", LETTERS)
    [(text, confidence, first, last)] = _decode(read, LETTERS, False)
    assert (text, first, last) == ("aab b", 0.0, 10.0)
    assert confidence == pytest.approx(0.9)
    words = _decode(read, LETTERS, True)
    assert [word[0] for word in words] == ["aab", "b"]
    # Six characters fired between the columns 0 and 9: half of one is 9 / 5 / 2 columns, and half a column's width.
    half = 9 / 5 / 2 + 0.5
    assert [word[2:] for word in words] == [(1.5 - half, 6.5 + half), (9.5 - half, 9.5 + half)]


def test_what_the_engine_says_of_itself() -> None:
    config = OcrConfig(threads=2, box_thresh=0.4)
    detector, recogniser = _model_files(config)
    settings = {
        name: value for name, value in asdict(config).items() if name not in ("threads", "det_model", "rec_model")
    }
    said = {
        "engine": "rapidocr models, varl reader",
        "version": importlib.metadata.version("rapidocr"),
        "runtime": f"onnxruntime {importlib.metadata.version('onnxruntime')}",
        "det_model": detector.name,
        "rec_model": recogniser.name,
        "settings": ", ".join(f"{name}={value}" for name, value in settings.items()),
    }
    assert OcrEngine(config).describe() == said
    options = "bag=one-sided, repeated=literal, eps=1e-05, confusables={'0': 'o'}, fold=True, regions=matched"
    made = OcrReward(config, bag="one-sided", confusables={"0": "o"}, regions="matched").describe()
    assert made == {"reward": "ocr", "options": options, **said}


def test_pictures_with_a_gradient_are_read() -> None:
    picture = torch.full((1, 3, 4, 4), 0.2, requires_grad=True)
    [pixels] = to_pixels(picture)
    assert isinstance(pixels, np.ndarray)
    assert pixels.dtype == np.uint8
    assert pixels.tolist() == [[[51] * 3] * 4] * 4


def test_settings_of_an_engine_that_are_none_are_named_in_order() -> None:
    with pytest.raises(TypeError, match=r"engine has no 2, 'a', 'b'; it has threads, "):
        OcrReward({"b": 1, "a": 2, 2: 3})  # type: ignore[dict-item]


def test_a_name_with_dots_leads_inward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inner_rewards.py").write_text(
        "class A:\n    class B:\n        @staticmethod\n        def c(i, p): return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert import_callable("inner_rewards:A.B.c")(None, None) == 3
    assert load_reward("inner_rewards:A.B.c").describe() == {"reward": "inner_rewards:A.B.c"}
    with pytest.raises(AttributeError, match=r"A\.B.*has no attribute 'd'"):
        import_callable("inner_rewards:A.B.d")


def test_rounded_weights_are_forgotten_where_a_reward_left_autocast_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would be used for later updates, whose weights are others."""
    cleared: list[int] = []
    inner = torch.clear_autocast_cache
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: cleared.append(1) or inner())
    with undisturbed():
        pass
    assert not cleared
    with undisturbed():
        torch.autocast("cpu", torch.bfloat16).__enter__()
    assert cleared
    assert not torch.is_autocast_enabled("cpu")


SCORED = {"bag": "l1", "repeated": "literal", "eps": 1e-5, "confusables": None, "fold": True}
DEFAULTS: dict[ModuleType, dict[str, dict[str, Any]]] = {
    base: {"FailureLog": {"most": 20}, "RewardOutput": {"failed": None, "regions": None, "texts": None}},
    engine: {
        "OcrConfig": {
            "threads": 1,
            "small_side": 128,
            "det_side_limit": 960,
            "det_min_side": 64,
            "det_thresh": 0.3,
            "box_thresh": 0.5,
            "polygon_unclip": 0.6,
            "crop_unclip": 1.0,
            "small_squeeze": 0.6,
            "word_boxes": False,
            "det_model": None,
            "rec_model": None,
        },
        "OcrEngine": {"config": None},
    },
    folding: {"folded_words": {"folded": True}},
    ocr: {
        "OcrReward": {"engine": None, "timeout_s": None, "regions": "all", **SCORED},
        "ocr_score": SCORED,
        "character_similarity": {"eps": 1e-5},
        **{name: {"fold": True} for name in ("ned", "word_accuracy", "word_hits", "word_neds")},
    },
    python: {"PythonReward": {"name": None, "timeout_s": None}, "import_callable": {"options": None}},
    process: {"ProcessCall": {"timeout_s": None}},
    scoring: {"Scoring": {"pool": None}},
    host: {"Host": {"start_timeout_s": 120.0}},
    worker: {"OcrWorker": {"config": None, "timeout_s": 60.0, "start_timeout_s": 120.0, "make_reader": None}},
}


@pytest.mark.parametrize("module", DEFAULTS, ids=lambda module: module.__name__)
def test_defaults(module: ModuleType) -> None:
    assert defaults(module) == DEFAULTS[module]
