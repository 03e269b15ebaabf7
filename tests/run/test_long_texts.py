"""Texts of very many characters cost no more work than can be shown or compared."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest
import torch

from varl.policy import Prompt
from varl.rewards.checks import MOST_CHARACTERS
from varl.rewards.ocr import _closest, ned, ocr_score, word_hits, word_neds
from varl.run.gallery import save_before_after, save_gallery, save_pictures
from varl.schedule import ScaleSchedule

LONG = ["w" * 100_000, "word " * 20_000, "wo rd" * 20_000]


@pytest.fixture
def alarm() -> object:
    """Ends a test that would go on for minutes."""
    earlier = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it takes too long"))
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, earlier)


@pytest.mark.parametrize("long", LONG)
def test_captions_of_pictures(long: str, tmp_path: Path, alarm: object) -> None:
    images, prompts = torch.zeros(1, 3, 16, 16), [Prompt(long, (long,))]
    save_gallery(tmp_path / "a.png", prompts, images, torch.ones(1), None, [long], None, ScaleSchedule.square([1]))
    save_before_after(tmp_path / "b.png", prompts, images, images, [long], ["other"])
    save_pictures(tmp_path / "c.png", prompts, images)


def test_the_longest_texts_that_are_compared(alarm: object) -> None:
    rng = random.Random(0)
    words = ["".join(rng.choice("abcdefgh") for _ in range(5)) for _ in range(MOST_CHARACTERS // 6)]
    other = ["".join(rng.choice("abcdefgh") for _ in range(5)) for _ in range(MOST_CHARACTERS // 6)]
    assert 0 < ocr_score(words, [(word, 0.5) for word in other]).similarity < 0.5
    assert 0 < ned(words[:200], other) < 1
    assert word_hits(["w" * 100_000], ["w" * 100_000]) == [True]
    assert word_neds(["w" * 100_000], ["w" * 5_000]) == [pytest.approx(0.05)]


def test_the_closest_word_is_difflibs() -> None:
    import difflib

    rng = random.Random(1)
    for _ in range(300):
        word, *have = ("".join(rng.choice("abc1") for _ in range(rng.randint(1, 7))) for _ in range(rng.randint(2, 9)))
        assert _closest(word, set(have)) == difflib.get_close_matches(word, have, n=1, cutoff=0.0)[0]
