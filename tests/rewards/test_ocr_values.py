"""The OCR reward's values to the letter: ties, options on both sides, reasons of failures, what readers may answer."""

from __future__ import annotations

import logging
import string
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from varl.policy import Prompt
from varl.rewards.engine import Line, OcrConfig, OcrEngine, Unread
from varl.rewards.folding import fold, folded_words
from varl.rewards.host import NotStarted
from varl.rewards.ocr import (
    OcrReward,
    OcrScore,
    _closest,
    character_similarity,
    ned,
    ocr_score,
    word_accuracy,
    word_hits,
    word_neds,
)
from varl.rewards.worker import OcrWorker

from .test_ocr import Script, line

PICTURE = torch.zeros(1, 3, 4, 4)


def test_similarity_is_of_the_longer_word() -> None:
    assert character_similarity("ab", "ac", 1.0) == 1 - 1 / 3
    assert character_similarity("abc", "a", 1.0) == character_similarity("a", "abc", 1.0) == 0.5
    assert character_similarity("", "", 0.5) == 1
    assert character_similarity("ab", "ac", 0.0) == 0.5


def test_scores_are_the_sum_of_their_terms() -> None:
    assert ocr_score(["TEA"], []) == OcrScore(-0.6, 0.0, 0.0, 0.6)
    score = ocr_score(["ab", "cd"], [("ab", 0.5), ("cx", 0.25)], eps=0.0)
    assert (score.completeness, score.similarity) == (0.25, 0.3125)
    assert score.penalty == pytest.approx(0.6 * 2 / 8)
    assert score.total == pytest.approx(0.25 + 0.3125 - 0.15)
    assert ocr_score(["ab", "\u200b"], [("\u200b", 1.0), ("ab", 1.0)], eps=0.0) == OcrScore(2, 1, 1, 0)
    assert ocr_score(["ab"], [("\u200b", 1.0)]) == OcrScore(-0.6, 0.0, 0.0, 0.6)


@pytest.mark.parametrize("repeated", ["literal", "one-to-one"])
def test_the_small_number_counts_either_way(repeated: Any) -> None:
    score = ocr_score(["ab"], [("ac", 1.0)], repeated=repeated, eps=1.0)
    assert score.similarity == pytest.approx(1 - 1 / 3)


def test_of_equally_similar_words_the_least_confident_counts() -> None:
    assert ocr_score(["ab"], [("ac", 0.75), ("ad", 0.25), ("ae", 0.5)], eps=0.0).similarity == 0.125


def test_one_to_one_takes_the_most_similar_then_the_most_confident_once() -> None:
    def of(wanted: list[str], *read: tuple[str, float]) -> tuple[float, float]:
        score = ocr_score(wanted, read, repeated="one-to-one", eps=0.0)
        return score.completeness, score.similarity

    assert of(["sale"], ("sale", 0.5), ("salt", 1.0)) == (0.5, 0.5)
    assert of(["sale"], ("salt", 0.5), ("sald", 0.25)) == (0, 0.375)
    assert of(["ab", "ab"], ("ab", 0.5), ("ab", 1.0), ("ax", 1.0)) == (0.75, 0.75)
    assert of(["ab", "ac"], ("ax", 1.0)) == (0, 0.25)
    # Each of two is as like either: the first wanted takes the first read of the most confident.
    assert of(["ab", "ab", "ab"], ("ab", 1.0)) == (pytest.approx(1 / 3), pytest.approx(1 / 3))


def test_confusables_may_be_numbers_and_are_one_character_each() -> None:
    assert ocr_score(["0"], [("o", 1.0)], confusables={0: "o"}).completeness == 1  # type: ignore[dict-item]
    assert ocr_score(["O"], [("0", 1.0)], confusables={"o": 0}).completeness == 1  # type: ignore[dict-item]
    for old, new in (("rn", "m"), ("m", "rn"), ("", "m"), ("m", "")):
        with pytest.raises(ValueError, match="one") as raised:
            ocr_score(["a"], [], confusables={old: new})
        assert str(raised.value) == f"confusables map one character to one character, got {old!r}: {new!r}"
    for old, new, one, other in (("…", "a", "...", "a"), ("a", "…", "a", "..."), (" ", "a", "", "a")):
        with pytest.raises(ValueError, match="folded") as raised:
            ocr_score(["a"], [], confusables={old: new})
        assert str(raised.value) == f"confusables are compared folded, where {old!r}: {new!r} is {one!r}: {other!r}"
    assert ocr_score(["you’re"], [("you're", 1.0)], fold=False, confusables={"’": "'"}).completeness == 1
    assert ocr_score(["aÉ"], [("ae", 1.0)], confusables={"é": "e"}).completeness == 1


def test_the_literal_way_folds_neither_side() -> None:
    curly, plain = "You’re", "you're"
    for wanted, read in ((curly, plain), (plain, curly)):
        assert ocr_score([wanted], [(read, 1.0)], fold=False).completeness == 0
        assert word_hits([wanted], [read], fold=False) == [False]
        assert word_accuracy([wanted], [read], fold=False) == 0
        near = [pytest.approx(5 / 6, abs=1e-5)]
        assert word_neds([wanted], [read], fold=False) == near
        assert [ned([wanted], [read], fold=False)] == near
        assert OcrReward(Script([line(read)]), fold=False)(PICTURE, [Prompt(words=(wanted,))]).parts[
            "word_accuracy"
        ].tolist() == [0]


def test_every_wanted_word_is_looked_up_among_all() -> None:
    assert word_hits(["c", "a", "b", "d", "a"], ["a b", "c"]) == [True, True, True, False, True]
    assert word_neds(["TEA"], ["\u200b"]) == [0.0]
    assert word_neds(["c", "a", "ab"], ["a", "c"]) == pytest.approx([1, 1, 0.5], abs=1e-5)
    assert word_hits([], ["a"]) == word_neds([], ["a"]) == []


def test_of_equally_close_words_it_is_the_last_by_alphabet() -> None:
    letters = string.ascii_lowercase
    words = {"ab" + c + c for c in letters[4:]}
    assert _closest("abcd", words) == "abzz"
    # Parts of a word reach the bounds of difflib's ratio, whatever order they come in.
    parts = [letters[i : i + 2] for i in range(25)]
    for order in (parts, parts[::-1]):
        assert _closest(letters, order) == "yz"  # type: ignore[arg-type]
    assert _closest("ab", {"xy"}) == "xy"
    assert [_closest(word, {"abx", "cdx"}) for word in ("abc", "cde", "abx", "xab", "dcd")] == [
        *("abx", "cdx", "abx", "abx", "cdx")
    ]


def test_what_a_picture_fails_for_is_said_to_the_letter(caplog: pytest.LogCaptureFixture) -> None:
    def failed(read: Any, *words: str) -> str:
        reward = OcrReward(Script(read), regions="wanted")
        out = reward(PICTURE, [Prompt(words=words, boxes=((0, 0, 1, 1),))])
        assert out.failed.tolist() == [True]
        assert out.failed.dtype == torch.bool
        assert out.regions == [[]]
        assert all(value.isnan().all() for value in out.parts.values())
        (reason,) = reward.failures.reasons
        return reason

    with caplog.at_level(logging.WARNING):
        assert failed([line("tea")]) == "the prompt wants no words"
    assert caplog.messages[0].startswith("OCR reward: pictures failed")
    assert failed([line("tea")], "", " ") == "the prompt wants no words"
    assert failed([line("tea")], "\u200b") == "the prompt wants no words"
    assert failed(Unread("it is dark"), "TEA") == "it is dark"
    assert OcrReward(Script(Unread("it is dark")))(PICTURE, [Prompt(words=("TEA",))]).texts == [""]
    # The regions were fine; the confidence is none.
    assert failed([line("tea", None)], "TEA").startswith("TypeError: ")  # type: ignore[arg-type]


def test_a_reward_has_every_field() -> None:
    reward = OcrReward(Script([line("the", 0.5), line("tea", 0.25)]), eps=0.0)
    out = reward(PICTURE, [Prompt(words=("TEA", "teas"))])
    assert out.texts == ["the tea"]
    assert list(out.parts) == ["completeness", "similarity", "penalty", "word_accuracy"]
    values = [float(out.score), *(float(value) for value in out.parts.values())]
    assert values == pytest.approx([0.125 + 0.21875 - 0.6 * 3 / 13, 0.125, 0.21875, 0.6 * 3 / 13, 0.5])
    assert (out.score.shape, out.score.dtype, out.failed.tolist()) == ((1,), torch.float32, [False])
    assert [len(own) for own in out.regions or []] == [2]
    none = OcrReward(Script())(torch.zeros(0, 3, 4, 4), [])
    assert (none.score.shape, none.regions, none.texts) == ((0,), [], [])
    for pictures, prompts in ((1, 2), (2, 1)):
        with pytest.raises(ValueError, match=f"{pictures} pictures but {prompts} prompts"):
            OcrReward(Script([], []))(torch.zeros(pictures, 3, 4, 4), [Prompt()] * prompts)


def test_words_of_several_texts_lead_to_matched_lines() -> None:
    read = [line("a tea", x=1.0), line("OIL", x=2.0), line("0IL", x=3.0), line("bus", x=4.0)]
    reward = OcrReward(Script(read), regions="matched", confusables={"0": "o"})
    out = reward(PICTURE, [Prompt(words=("GRAND TEA", "OIL"))])
    assert [float(one[0, 0]) for one in (out.regions or [])[0]] == [1, 2, 3]
    assert reward.compared("GRAND 0il\u200b \u200b") == ["grand", "oil"]


class Answers:
    """A reader that gives, or does, what it was made with."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def read(self, images: Tensor) -> Any:
        return self.answer() if callable(self.answer) else self.answer

    def describe(self) -> dict[str, str]:
        return {}


class Late(Sequence[Any]):
    """An answer that fails as it is looked at."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: Any) -> Any:
        raise self.error

    def __iter__(self) -> Iterator[Any]:
        raise self.error


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ([], "ValueError: a reader must answer for 1 pictures, gave 0"),
        ([[], []], "ValueError: a reader must answer for 1 pictures, gave 2"),
        (Late(OSError("torn")), "OSError: torn"),
        (Late(SystemExit(3)), "SystemExit: 3"),
        ([3], "TypeError: 'int' object is not iterable"),
        (None, "TypeError: object of type 'NoneType' has no len()"),
    ],
)
def test_what_is_no_answer_fails_the_pictures(answer: Any, reason: str) -> None:
    reward = OcrReward(Answers(answer))
    assert reward(PICTURE, [Prompt(words=("TEA",))]).failed.tolist() == [True]
    assert reward.failures.reasons == {reason: 1}


def test_ctrl_c_in_a_reader_passes() -> None:
    def interrupted() -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        OcrReward(Answers(interrupted))(PICTURE, [Prompt(words=("TEA",))])


ENGINE_FIELDS = ", ".join(one.name for one in fields(OcrConfig))


def test_what_is_no_engine_is_refused() -> None:
    class Unreadable:
        read = 3

    for given in (3, "large", Unreadable):
        with pytest.raises(ValueError, match="mapping") as raised:
            OcrReward(given)  # type: ignore[arg-type]
        assert (
            str(raised.value)
            == f"engine is a mapping of settings ({ENGINE_FIELDS}) or a reader, got {repr(given)[:100]}"
        )
    with pytest.raises(TypeError) as unknown:
        OcrReward({"thread": 2})
    assert str(unknown.value) == f"engine has no 'thread'; it has {ENGINE_FIELDS}"
    assert ENGINE_FIELDS.startswith("threads, small_side, det_side_limit")
    with pytest.raises(ValueError, match=r"^timeout_s is for the built-in engine"):
        OcrReward(Script([]), timeout_s=3.0)
    with pytest.raises(ValueError, match=r"^engine: threads must be int, got 'many'$"):
        OcrReward({"threads": "many"})
    with pytest.raises(ValueError, match=r"^options: eps must be float, got 'small'$"):
        OcrReward(eps="small")  # type: ignore[arg-type]


def test_engines_get_their_settings_and_limits() -> None:
    config = OcrConfig(box_thresh=0.4)
    for given in (config, {"box_thresh": 0.4}, {"box_thresh": "0.4"}):
        inside, outside = OcrReward(given).reader, OcrReward(given, timeout_s="7").reader  # type: ignore[arg-type]
        assert isinstance(inside, OcrEngine)
        assert isinstance(outside, OcrWorker)
        assert (inside.config, outside.config, outside.timeout_s) == (config, config, 7.0)
    assert isinstance(OcrReward().reader, OcrEngine)
    reader = Script([])
    assert OcrReward(reader).reader is reader


def test_options_may_be_text() -> None:
    reward = OcrReward(Script([]), eps="0.5", fold="false", confusables={"0": "o"})  # type: ignore[arg-type]
    assert reward.options == {
        "bag": "l1",
        "repeated": "literal",
        "eps": 0.5,
        "confusables": {"0": "o"},
        "fold": False,
    }
    assert reward.fold is False
    assert OcrReward(Script([])).describe() == {
        "reward": "ocr",
        "options": "bag=l1, repeated=literal, eps=1e-05, confusables={}, fold=True, regions=all",
        "engine": "script",
    }
    with pytest.raises(ValueError, match="regions") as raised:
        OcrReward(regions="some")  # type: ignore[arg-type]
    assert str(raised.value) == "regions is one of ('all', 'matched', 'wanted'), got 'some'"
    for given in ("0o", [("0", "o")]):
        with pytest.raises(ValueError, match=r"^confusables is a mapping of characters, e\.g\. "):
            OcrReward(Script([]), confusables=given)  # type: ignore[arg-type]


def test_confusables_are_the_rewards_own() -> None:
    given = {"’": "'"}
    reward = OcrReward(Script([]), fold=False, confusables=given)
    given.clear()
    assert reward.options["confusables"] == {"’": "'"}
    assert reward.compared("You’re it") == ["you're", "it"]


def test_what_the_built_in_engine_refuses_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not so with readers of one's own, whatever they raise."""
    prompts = [Prompt(words=("TEA",))]
    worker = OcrWorker()
    for reader in (OcrEngine(), worker):
        with pytest.raises(ValueError, match="images must be"):
            OcrReward(reader)(torch.zeros(1, 3, 4), prompts)
    monkeypatch.setattr(worker._seats[0], "read", Late(NotStarted("no room")).__getitem__)
    with pytest.raises(NotStarted, match="no room"):
        OcrReward(worker)(PICTURE, prompts)


def test_a_line_is_what_the_reader_says() -> None:
    boxes = OcrReward(Script([]), regions="wanted")._regions([], Prompt(boxes=((0, 0.25, 0.5, 1),)), 80, 40)
    assert [(one.tolist(), one.dtype) for one in boxes] == [([[0, 10], [40, 10], [40, 40], [0, 40]], np.float32)]
    wide = np.array([[0, 0], [3, 0], [3, 1], [0, 1]], np.float32)
    out = OcrReward(Answers(([Line("tea", 1.0, wide)],)))(PICTURE, [Prompt(words=("TEA",))])
    assert [own[0].tolist() for own in out.regions or []] == [wide.tolist()]


ALIKE = {
    "'": "‘’‚‛′‵ʹʻʼʽˈ‹›´ꞌ＇",
    '"': "“”„‟″‶«»ˮ〝〞〟＂",
    "-": "‐‑‒–—―−⁃﹘﹣－",
    "·": "•∙⋅‧・･",
    "...": "…",
    "/": "⁄∕",
}


def test_each_sign_is_folded_to_its_plain_one_and_no_other() -> None:
    for plain, signs in ALIKE.items():
        assert [fold(sign) for sign in signs] == [plain] * len(signs)
        assert [fold("é" + sign) for sign in signs] == ["é" + plain] * len(signs)
    assert fold("é" + string.printable) == "é" + string.printable.lower()


def test_what_cannot_be_seen_is_left_out_and_its_neighbours_not() -> None:
    assert [fold(f"a{sign}b") for sign in "\ufe00\ufe07\ufe0f\u200d\u00ad\ufeff"] == ["ab"] * 6
    # Next to the marks that are left out, as far as compatibility leaves them what they are.
    assert fold("a\ufe20b\ufdfdc") == "a\ufe20b" + fold("\ufdfd") + "c"
    assert fold("a\ufdfd") == "a\ufdfd"
    assert fold("a\ufe10") == "a,"
    assert fold("e\u200d\u0301") == "é"
    assert fold("½ STRASSE ß") == "1/2 strasse ss"


def test_words_are_folded_or_in_lower_case() -> None:
    assert folded_words(["A  b", "", "ＣＤ’"]) == ["a", "b", "cd'"]
    assert folded_words(["A  b", "", "ＣＤ’"], False) == ["a", "b", "ｃｄ’"]
    assert folded_words(["a¨b \u200b"]) == ["a\u0308b", ""]
