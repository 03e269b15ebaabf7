"""What is said of words that cannot be won, and how they are drawn and looked up, to the letter and the pixel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from varl.policy import Prompt
from varl.rewards import wanted
from varl.rewards.engine import Line, OcrEngine, Unread
from varl.rewards.folding import folded_words
from varl.rewards.ocr import OcrReward
from varl.rewards.wanted import FONTS, Legibility, check_alphabet, check_words, drawn, legibility

POLYGON = np.zeros((4, 2), np.float32)


def compared(text: str) -> list[str]:
    return folded_words([text])


def prompts(*words: str) -> list[Prompt]:
    return [Prompt(words=words)]


def test_prompts_without_words() -> None:
    given = [Prompt("a", ("TEA",)), Prompt("b"), Prompt("c", ("", "x")), Prompt(label=4), Prompt("d", ("", " "))]
    with pytest.raises(ValueError, match="needs") as raised:
        check_words(given, compared)
    assert str(raised.value) == (
        "the OCR reward needs wanted words: prompt 2 of 5 ('b') has none, as have 3 of 5 in all; put them in quotes "
        "(a sign that says 'SALE'), or give them as \"words\" in a .jsonl file"
    )
    check_words(given[:1] + given[2:3], compared)


@pytest.mark.parametrize(
    ("word", "lacking"),
    [
        ("пAп", "п (CYRILLIC SMALL LETTER PE)"),
        ("b\x7f", "b (LATIN SMALL LETTER B), \x7f (U+007F)"),
        ("bcdef", "b (LATIN SMALL LETTER B), " + ", ".join(f"{c} (LATIN SMALL LETTER {c.upper()})" for c in "cdef")),
        (
            "abcdefga",
            ", ".join(f"{c} (LATIN SMALL LETTER {c.upper()})" for c in "bcdef") + " and 1 more",
        ),
    ],
)
def test_letters_that_are_lacking_are_named_once(word: str, lacking: str) -> None:
    given = [Prompt("fine", ("A",)), Prompt(label=7, words=("a", word))]
    with pytest.raises(ValueError, match="lacks") as raised:
        check_alphabet(given, compared, "a", "the model")
    assert str(raised.value) == (
        f"prompt 2 of 2 ('class 7') wants {word!r}, but the alphabet of the model lacks {lacking}: no picture could be "
        "read so; choose a recogniser of that script (rec_model of the reward's engine: {name: ocr, engine: "
        "{rec_model: FILE.onnx}}), or leave the word out"
    )


class Knows:
    """A reader with an alphabet, which reads what it was told to."""

    def __init__(self, *readings: Any) -> None:
        self.readings, self.shown = list(readings), []  # type: ignore[var-annotated]

    def alphabet(self) -> list[str]:
        return list("Éab")

    def read(self, images: Tensor) -> list[Any]:
        assert images.ndim == 4
        self.shown += images
        return [self.readings.pop(0) if self.readings else []]

    def describe(self) -> dict[str, str]:
        return {}


def test_the_recogniser_is_named() -> None:
    with pytest.raises(ValueError, match="alphabet of the recogniser lacks c"):
        OcrReward(Knows()).check(prompts("Abc"))
    OcrReward(Knows()).check(prompts("éAB"))
    model = OcrEngine().describe()["rec_model"]
    with pytest.raises(ValueError, match=f"alphabet of {model} lacks п"):
        OcrReward().check(prompts("п"))
    with pytest.raises(ValueError, match="needs wanted words"):
        OcrReward(Knows()).check([Prompt()])


def test_legibility_says() -> None:
    assert str(Legibility([], 2, 3)) == "all are read (2 of 3 wanted words checked, the shortest first)"
    assert str(Legibility(["I", "l"], 2, 2)) == "cannot read 'I', 'l' (2 of 2 wanted words checked, the shortest first)"


def line(text: str) -> Line:
    return Line(text, 1.0, POLYGON)


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_words_are_shown_by_length_then_by_alphabet_in_two_fonts() -> None:
    reader = Knows()
    found = legibility(reader, prompts("to be", "Cc z", "TO"), compared, 9, 60.0)
    assert found == Legibility(["z", "be", "Cc", "TO"], 4, 4)
    assert same(reader.shown, [drawn(word, font) for word in ("z", "be", "Cc", "TO") for font in FONTS])


def test_a_word_is_read_in_either_font_on_any_line() -> None:
    cases: list[tuple[list[Any], list[str], int]] = [
        ([[line("tea")]], [], 1),
        ([[line("x"), line("a TEA")]], [], 1),
        ([[], [line("Tea")]], [], 2),
        ([Unread("no"), [line("Tea")]], [], 2),
        ([Unread("no"), Unread("no")], ["TEA"], 2),
        ([[line("te"), line("a")], [line("teas")]], ["TEA"], 2),
    ]
    for readings, unread, shown in cases:
        reader = Knows(*readings)
        assert legibility(reader, prompts("TEA"), compared, 9, 60.0) == Legibility(unread, 1, 1)
        assert len(reader.shown) == shown


def test_words_that_no_font_here_has_are_not_counted() -> None:
    reader = Knows()
    assert legibility(reader, prompts("中文", "a中", "ab"), compared, 1, 60.0) == Legibility(["ab"], 1, 3)
    only_bold = {"DejaVuSans-Bold": {ord("a")}, "DejaVuSans": {ord("b")}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wanted, "_glyphs", only_bold.__getitem__)
        assert legibility(reader, prompts("a", "b"), compared, 9, 60.0) == Legibility([], 0, 2)


@pytest.mark.parametrize(
    ("most", "seconds", "times", "checked"),
    [
        (0, 60.0, [10], 0),
        (3, 60.0, [10, 11, 12], 3),
        (9, 5.0, [10, 15, 15, 15], 4),
        (9, 5.0, [10, 15, 15.5], 2),
        (9, 0.0, [10, 11], 1),
    ],
)
def test_no_word_is_begun_beyond_the_bounds(
    most: int, seconds: float, times: list[float], checked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = list(times)
    monkeypatch.setattr(wanted.time, "monotonic", lambda: left.pop(0))
    found = legibility(Knows(), prompts("a", "b", "c", "d"), compared, most, seconds)
    assert found == Legibility(["a", "b", "c", "d"][:checked], checked, 4)
    assert left == []


@pytest.mark.parametrize("font", [None, "DejaVuSans-Bold", "DejaVuSans"])
@pytest.mark.parametrize(("word", "height"), [("A", 64), ("Qgj", 66 - 2), ("Ǻģ", 66), ("Ễj", 71), ("Jet", 64)])
def test_words_are_drawn_in_the_middle(word: str, height: int, font: str | None) -> None:
    picture = drawn(word) if font is None else drawn(word, font)
    name = font or "DejaVuSans-Bold"
    face = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{name}.ttf", 36)
    left, top, right, bottom = face.getbbox(word)
    tall = max(64, bottom - top + 24)
    assert picture.shape == (3, tall, right - left + 48)
    assert font == "DejaVuSans" or tall == height
    image = Image.new("RGB", (int(right - left) + 48, int(tall)), (255, 255, 255))
    ImageDraw.Draw(image).text((24 - left, (tall - bottom + top) / 2 - top), word, (0, 0, 0), face)
    assert torch.equal(picture, torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255)
    rows, columns = ((picture[0] < 1).any(axis).nonzero().flatten() for axis in (1, 0))
    assert abs(int(rows.min()) - (tall - 1 - int(rows.max()))) <= 1
    assert 23 <= int(columns.min()) <= 28
    assert 23 <= picture.shape[2] - 1 - int(columns.max()) <= 28
    assert (float(picture.min()), float(picture.max())) == (0, 1)


def test_fonts_are_those_that_come_with_matplotlib() -> None:
    assert FONTS == ("DejaVuSans-Bold", "DejaVuSans")
    assert wanted._path("DejaVuSans") == str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf")
    assert [wanted._has("DejaVuSans", word) for word in ("Tea", "T中", "中T", "")] == [True, False, False, True]
