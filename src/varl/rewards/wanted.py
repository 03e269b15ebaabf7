"""Whether the OCR reward can be won: are words wanted, does the engine know their letters, does it read them?"""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from varl.policy import Prompt
from varl.rewards.engine import TextReader, Unread

__all__ = ["Legibility", "check_alphabet", "check_words", "drawn", "legibility"]

FONTS = ("DejaVuSans-Bold", "DejaVuSans")
SIZE, MARGIN, HEIGHT = 36, 24, 64
Compared = Callable[[str], Sequence[str]]
"""The words of a text as the reward compares them."""


def check_words(prompts: Sequence[Prompt], compared: Compared) -> None:
    """Refuse prompts that want no words.

    Raises:
        ValueError: naming the first.
    """
    wordless = [i for i, prompt in enumerate(prompts) if not any(compared(word) for word in prompt.words)]
    if wordless:
        raise ValueError(
            f"the OCR reward needs wanted words: {_prompt(prompts, wordless[0])} has none, as have {len(wordless)} of "
            f"{len(prompts)} in all; put them in quotes (a sign that says 'SALE'), or give them as \"words\" in a "
            ".jsonl file"
        )


def check_alphabet(prompts: Sequence[Prompt], compared: Compared, alphabet: Collection[str], model: str) -> None:
    """Refuse wanted words with letters that the recogniser does not have, which no picture could win.

    Args:
        alphabet: the recogniser's characters, as they are compared.
        model: the recogniser's name.

    Raises:
        ValueError: naming the first such word and its characters.
    """
    for i, prompt in enumerate(prompts):
        for word in prompt.words:
            lacking = [c for c in dict.fromkeys("".join(compared(word))) if c not in alphabet]
            if lacking:
                named = ", ".join(f"{c} ({unicodedata.name(c, f'U+{ord(c):04X}')})" for c in lacking[:5])
                more = f" and {len(lacking) - 5} more" if len(lacking) > 5 else ""
                raise ValueError(
                    f"{_prompt(prompts, i)} wants {word!r:.80}, but the alphabet of {model} lacks {named}{more}: no "
                    "picture could be read so; choose a recogniser of that script (rec_model of the reward's engine: "
                    "{name: ocr, engine: {rec_model: FILE.onnx}}), or leave the word out"
                )


def _prompt(prompts: Sequence[Prompt], i: int) -> str:
    said = prompts[i].text or f"class {prompts[i].label}"
    return f"prompt {i + 1} of {len(prompts)} ({said!r:.80})"


@dataclass(frozen=True)
class Legibility:
    """Which wanted words an engine does not read where they are drawn in plain black on white.

    Attributes:
        unread: those words.
        checked: how many were drawn, the shortest first.
        words: how many different words are wanted.
    """

    unread: list[str]
    checked: int
    words: int

    def __str__(self) -> str:
        found = f"cannot read {', '.join(map(repr, self.unread))}" if self.unread else "all are read"
        return f"{found} ({self.checked} of {self.words} wanted words checked, the shortest first)"


def legibility(
    reader: TextReader, prompts: Sequence[Prompt], compared: Compared, most: int, seconds: float
) -> Legibility:
    """Draw wanted words and read them; a word is read if it is in one of two fonts.

    Args:
        most: words to check.
        seconds: begin no other word after that.
    """
    spelt = {form: word for p in prompts for text in p.words for word in text.split() for form in compared(word)}
    begin, unread, checked = time.monotonic(), [], 0
    for form, word in sorted(spelt.items(), key=lambda item: (len(item[0]), item[0])):
        if checked == most or (checked and time.monotonic() - begin > seconds):
            break
        if all(_has(font, word) for font in FONTS):
            checked += 1
            if not any(_reads(reader, drawn(word, font), form, compared) for font in FONTS):
                unread.append(word)
    return Legibility(unread, checked, len(spelt))


def _reads(reader: TextReader, picture: Tensor, form: str, compared: Compared) -> bool:
    (reading,) = reader.read(picture[None])
    return not isinstance(reading, Unread) and any(form in compared(line.text) for line in reading)


def drawn(word: str, font: str = FONTS[0]) -> Tensor:
    """A word in black on white, [3, H, W] in [0, 1]."""
    face = ImageFont.truetype(_path(font), SIZE)
    left, top, right, bottom = face.getbbox(word)
    width, height = round(right - left) + 2 * MARGIN, max(HEIGHT, round(bottom - top) + MARGIN)
    image = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(image).text((MARGIN - left, (height - bottom + top) / 2 - top), word, "black", face)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def _path(font: str) -> str:
    return str(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{font}.ttf"))


def _has(font: str, word: str) -> bool:
    return all(ord(c) in _glyphs(font) for c in word)


@cache
def _glyphs(font: str) -> Collection[int]:
    return FT2Font(_path(font)).get_charmap().keys()
