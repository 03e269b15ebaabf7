"""A perfect picture can win whatever way the wanted words are typed: both sides are folded."""

from __future__ import annotations

import string
import unicodedata

import pytest
import torch

from varl.policy import Prompt
from varl.rewards.folding import fold, folded_words
from varl.rewards.ocr import OcrReward, ned, ocr_score, word_accuracy, word_hits, word_neds

from .test_ocr import Script, line

PAIRS = [
    ("You’re", "YOU'RE"),
    ("‘tis", "'tis"),
    ("“SALE”", '"sale"'),
    ("«BONJOUR»", '"bonjour"'),
    (unicodedata.normalize("NFD", "CAFÉ"), "café"),
    ("CAFÉ", unicodedata.normalize("NFD", "café")),
    ("1999–2024", "1999-2024"),
    ("RE‑USE", "re-use"),
    ("−5", "-5"),
    ("WAIT…", "wait..."),
    ("ﬁsh", "FISH"),
    ("ＯＰＥＮ", "open"),
    ("co\u00adop", "coop"),
    ("\u200bTEA\ufeff", "tea"),
    ("Straße", "STRASSE"),
    ("ΟΔΟΣ", "οδος"),
    ("10´", "10'"),
    ("½", "1/2"),
]


@pytest.mark.parametrize(("wanted", "read"), PAIRS)
def test_what_looks_alike_is_alike(wanted: str, read: str) -> None:
    assert fold(wanted) == fold(read)
    assert ocr_score([wanted], [(read, 1.0)]).total == pytest.approx(2, abs=2e-5)
    assert word_hits([wanted], [read]) == [True]
    assert ned([wanted], [read]) == pytest.approx(1, abs=2e-5)


def test_the_literal_way_is_an_option() -> None:
    wanted, read = "You’re", "you're"
    # One letter of six differs: 5/6 alike, 2 of 12 characters too many or too few.
    assert ocr_score([wanted], [(read, 1.0)], fold=False).total == pytest.approx(5 / 6 - 0.6 * 2 / 12, abs=2e-5)
    assert word_hits([wanted], [read], fold=False) == [False]
    assert word_accuracy([wanted], [read], fold=False) == 0
    assert word_neds([wanted], [read], fold=False) == [pytest.approx(5 / 6, abs=2e-5)]
    for folded in (True, False):
        output = OcrReward(Script([line(read)]), fold=folded, regions="matched")(
            torch.zeros(1, 3, 8, 8), [Prompt(words=(wanted,))]
        )
        assert (output.score[0] > 1.9) == folded
        assert output.parts["word_accuracy"].tolist() == [float(folded)]
        assert output.regions is not None
        assert len(output.regions[0]) == folded


def test_ascii_is_lower_cased_only() -> None:
    assert fold(string.printable) == string.printable.lower()
    assert fold("".join(map(chr, range(128)))) == "".join(map(chr, range(128))).lower()


def test_folding_is_done_once() -> None:
    for number in [*range(0x3000), *range(0xFB00, 0x10000)]:
        if not 0xD800 <= number < 0xE000:
            assert fold(fold(chr(number))) == fold(chr(number)), hex(number)


def test_a_word_stays_one_word() -> None:
    """The gallery pairs words as written with what became of them."""
    for number in range(0x10000):
        if not 0xD800 <= number < 0xE000 and not chr(number).isspace():
            assert len(folded_words([f"a{chr(number)}b"])) == len(f"a{chr(number)}b".split())
    assert word_hits(["\u200b"], ["\u200b"]) == [False]  # nothing that could be seen
    with pytest.raises(ValueError, match="without wanted words"):
        ocr_score(["\u200b"], [("a", 1.0)])


def test_confusables_are_folded_too() -> None:
    assert ocr_score(["CAFÉ"], [("cafe", 1.0)], confusables={"É": "e"}).completeness == 1
    with pytest.raises(ValueError, match="folded, where '…'"):
        OcrReward(Script([]), confusables={"…": "."})
