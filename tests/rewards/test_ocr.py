"""The OCR reward's formula on hand-computed values, and the reward as a whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from varl.policy import Prompt
from varl.rewards.engine import Line, OcrEngine, Unread
from varl.rewards.ocr import OcrReward, ned, ocr_score, word_accuracy, word_hits, word_neds

from .rendering import draw_many, stack


def terms(*args, **kwargs):
    s = ocr_score(*args, **kwargs)
    assert s.total == pytest.approx(s.completeness + s.similarity - s.penalty)
    return pytest.approx((s.completeness, s.similarity, s.penalty), abs=2e-5)


def test_perfect_reading():
    assert terms(["OPEN", "Cafe"], [("open", 1.0), ("CAFE", 1.0)]) == (1, 1, 0)
    assert ocr_score(["OPEN"], [("open", 1.0)]).total == pytest.approx(2)


def test_confidence_weighs_both_terms():
    assert terms(["OPEN", "CAFE"], [("open", 0.9), ("cafe", 0.5)]) == (0.7, 0.7, 0)


def test_one_letter_wrong():
    # LD(open, 0pen) = 1 - 1/4; characters: o and 0 differ, 2 of 8.
    assert terms(["OPEN"], [("0pen", 0.8)]) == (0, 0.75 * 0.8, 0.6 * 2 / 8)


def test_one_of_two_words_missing():
    # cafe and open share no letter in place: 4 edits, LD = 0. Characters: 'cafe' is missing, 4 of 12.
    assert terms(["OPEN", "CAFE"], [("open", 1.0)]) == (0.5, 0.5, 0.6 * 4 / 12)


def test_an_extra_word_costs_only_the_penalty():
    assert terms(["TEA"], [("tea", 1.0), ("bus", 1.0)]) == (1, 1, 0.6 * 3 / 9)


def test_nothing_recognised():
    assert terms(["OPEN"], []) == (0, 0, 0.6)
    assert terms(["OPEN"], [("  ", 0.9)]) == (0, 0, 0.6)
    assert ocr_score(["OPEN"], []).total == pytest.approx(-0.6)


def test_penalty_limits():
    assert ocr_score(["ABC"], [("cab", 1.0)]).penalty == 0  # an anagram: same multiset
    assert ocr_score(["ABC"], [("xyz", 1.0)]).penalty == pytest.approx(0.6)


def test_one_sided_bag_forgives_what_is_too_much():
    assert terms(["TEA"], [("tea", 1.0), ("bus", 1.0)], bag="one-sided") == (1, 1, 0)
    # open / 0pen: only the o is missing, of 8 characters.
    assert ocr_score(["OPEN"], [("0pen", 1.0)], bag="one-sided").penalty == pytest.approx(0.6 / 8)


def test_least_confident_of_equal_words_counts():
    assert terms(["TEA"], [("tea", 0.9), ("tea", 0.4)]) == (0.4, 0.4, 0.6 * 3 / 9)


def test_repeated_wanted_words():
    # Literally, one 'sale' serves both; one to one, the second has no partner.
    wanted, read = ["SALE", "SALE"], [("sale", 0.8)]
    assert terms(wanted, read) == (0.8, 0.8, 0.6 * 4 / 12)
    assert terms(wanted, read, repeated="one-to-one") == (0.4, 0.4, 0.6 * 4 / 12)
    both = [("sale", 0.8), ("sale", 0.6)]
    assert terms(wanted, both) == (0.6, 0.6, 0)
    assert terms(wanted, both, repeated="one-to-one") == (0.7, 0.7, 0)


def test_one_to_one_gives_the_exact_word_first():
    # 'sale' goes to SALE though SALT stands first; SALT is left with 'tall', 2 edits away.
    score = ocr_score(["SALT", "SALE"], [("sale", 1.0), ("tall", 1.0)], repeated="one-to-one")
    assert score.completeness == pytest.approx(0.5)
    assert score.similarity == pytest.approx((1 + 0.5) / 2, abs=2e-5)


def test_words_split_at_white_space_and_inherit_confidence():
    assert terms(["GRAND OPENING"], [("grand  Opening", 0.9)]) == (0.9, 0.9, 0)
    assert terms(["GRAND OPENING"], [("grand", 0.9), ("opening", 0.7)]) == (0.8, 0.8, 0)


def test_confusables_count_as_equal():
    assert ocr_score(["OIL"], [("0ll", 1.0)]).completeness == 0
    same = {"0": "o", "i": "l"}
    assert terms(["OIL"], [("0ll", 1.0)], confusables=same) == (1, 1, 0)
    with pytest.raises(ValueError, match="one character"):
        ocr_score(["OIL"], [("oil", 1.0)], confusables={"rn": "m"})


def test_bad_questions_are_refused():
    with pytest.raises(ValueError, match="without wanted words"):
        ocr_score([" "], [("tea", 1.0)])
    with pytest.raises(ValueError, match="bag"):
        ocr_score(["TEA"], [], bag="l2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="repeated"):
        ocr_score(["TEA"], [], repeated="twice")  # type: ignore[arg-type]


def test_word_metrics_follow_the_evaluator():
    assert word_hits(["Grand Opening", "TEA"], ["grand", "tea!"]) == [True, False, False]
    assert word_accuracy(["Grand Opening", "TEA"], ["grand", "tea!"]) == pytest.approx(1 / 3)
    # tea against tea!: one edit over four characters.
    assert word_neds(["TEA"], ["grand", "tea!"]) == pytest.approx([0.75], abs=1e-5)
    assert ned(["TEA", "GRAND"], ["grand tea!"]) == pytest.approx(0.875, abs=1e-5)
    assert word_neds(["abcd"], ["abxx"]) == pytest.approx([0.5], abs=1e-5)  # no similarity is too small
    assert ned(["TEA"], []) == 0
    assert word_accuracy(["TEA"], []) == 0
    assert np.isnan(word_accuracy([], ["tea"]))
    assert np.isnan(ned([], ["tea"]))


def test_ned_takes_the_closest_by_difflib_not_by_edit_distance():
    # difflib: bcdaxx 2*3/10 = 0.6, axxd 2*2/8 = 0.5; by edits bcdaxx is 4 of 6 away, axxd 2 of 4.
    assert word_neds(["abcd"], ["bcdaxx", "axxd"]) == pytest.approx([1 - 4 / 6], abs=1e-5)


class Script:
    """A reader that says what it was told to."""

    def __init__(self, *readings):
        self.readings = list(readings)

    def read(self, images):
        return self.readings

    def describe(self):
        return {"engine": "script"}


def line(text, confidence=1.0, x=0.0):
    return Line(text, confidence, np.array([[x, 0], [x + 10, 0], [x + 10, 5], [x, 5]], np.float32))


def test_reward_of_rendered_pictures():
    pictures = draw_many(6, seed=3)
    prompts = [Prompt(words=tuple(p.words)) for p in pictures]
    prompts[1] = Prompt(words=("ZZZZ",))
    out = OcrReward()(stack(pictures), prompts)
    assert out.score.dtype == torch.float32
    assert out.score.shape == (6,)
    assert not out.failed.any()
    right = torch.tensor([True, False, True, True, True, True])
    assert (out.score[right] > 1.7).all()
    assert out.score[1] < 0
    torch.testing.assert_close(out.score, out.parts["completeness"] + out.parts["similarity"] - out.parts["penalty"])
    assert out.parts["word_accuracy"].tolist() == [1, 0, 1, 1, 1, 1]
    assert [len(r) for r in out.regions] == [len(p.words) for p in pictures]
    assert [t.lower().split() for t in out.texts] == [[w.lower() for w in p.words] for p in pictures]


def test_unread_pictures_are_failed_and_counted_not_scored_zero():
    reward = OcrReward(Script([line("TEA")], Unread("broken pen"), [line("TEA")]))
    prompts = [Prompt(words=("TEA",)), Prompt(words=("TEA",)), Prompt(text="a cat")]
    out = reward(torch.zeros(3, 3, 64, 64), prompts)
    assert out.failed.tolist() == [False, True, True]
    assert out.score.isnan().tolist() == [False, True, True]
    assert out.parts["penalty"].isnan().tolist() == [False, True, True]
    assert reward.failures.reasons == {"broken pen": 1, "the prompt wants no words": 1}
    assert reward.failures.total == 2


def test_regions():
    prompt = Prompt(words=("TEA",), boxes=((0.25, 0.5, 0.75, 1.0),))
    read = [line("the tea", x=1.0), line("bus", x=2.0)]

    def left_edges(regions):
        out = OcrReward(Script(read), regions=regions)(torch.zeros(1, 3, 40, 80), [prompt])
        return [float(p[0, 0]) for p in out.regions[0]], out.regions[0][-1]

    assert left_edges("all")[0] == [1, 2]
    assert left_edges("matched")[0] == [1]
    edges, last = left_edges("wanted")
    assert edges == [1, 2, 20]
    assert last.tolist() == [[20, 20], [60, 20], [60, 40], [20, 40]]


def test_reward_options_are_checked_at_once():
    with pytest.raises(ValueError, match="regions"):
        OcrReward(regions="some")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bag"):
        OcrReward(bag="l2")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="thread"):
        OcrReward({"thread": 2})
    with pytest.raises(ValueError, match="2 pictures but 1 prompts"):
        OcrReward(Script([], []))(torch.zeros(2, 3, 8, 8), [Prompt()])


def test_reward_describes_engine_and_options():
    said = OcrReward({"threads": 2}, bag="one-sided").describe()
    assert said["reward"] == "ocr"
    assert "bag=one-sided" in said["options"]
    assert said["rec_model"] == OcrEngine().describe()["rec_model"]
