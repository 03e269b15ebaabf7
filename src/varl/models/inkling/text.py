"""What Inkling is asked to write: its alphabet, the grammar of its prompts, and where each letter goes."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

import numpy as np

from varl.policy import Box, Prompt

__all__ = [
    "ALPHABET",
    "PLACES",
    "Region",
    "first_column",
    "is_held_out",
    "layout",
    "make_prompt",
    "parse_prompt",
    "random_regions",
]

ALPHABET = "ABCDEFGHJKLMNPRSTUVWXYZ"
"""Capital letters without I, O and Q, which an OCR confuses with 1 and 0."""
PLACES = ("top", "middle", "bottom")
MIN_LETTERS, MAX_LETTERS = 3, 5
PICTURE = 48
CELL = 8
"""A letter fills two cells of 8 x 8 pixels, one above the other; six columns, three lines."""
COLUMNS = PICTURE // CELL
ROWS = {"top": 0, "middle": 2, "bottom": 4}
_VOWELS = "AEUY"
_CONSONANTS = "".join(c for c in ALPHABET if c not in _VOWELS)
_SHAPES = ("CVC", "CVCV", "VCVC", "CVCC", "CCVC", "CVCVC", "CCVCV", "VCVCV")
_REGION = re.compile(r"'([^']*)'\s+(?:at|in)\s+the\s+(\w+)")
_QUOTED = re.compile(r"(?<!\w)'([^']*)'(?!\w)")


@dataclass(frozen=True)
class Region:
    """One word and its place."""

    word: str
    place: str


def is_held_out(word: str) -> bool:
    """Whether a word is kept for evaluation: a tenth of all words, by hash, never trained on."""
    return hashlib.sha256(word.encode()).digest()[0] % 10 == 0


def _random_word(rng: np.random.Generator, held_out: bool) -> str:
    while True:
        shape = _SHAPES[rng.integers(len(_SHAPES))]
        letters = (_VOWELS if kind == "V" else _CONSONANTS for kind in shape)
        word = "".join(several[rng.integers(len(several))] for several in letters)
        if is_held_out(word) == held_out:
            return word


def random_regions(rng: np.random.Generator, held_out: bool = False) -> tuple[Region, ...]:
    """One to three random words at distinct places, top to bottom; all held-out words, or none."""
    count = int(rng.integers(1, len(PLACES) + 1))
    places = sorted(rng.choice(len(PLACES), size=count, replace=False))
    return tuple(Region(_random_word(rng, held_out), PLACES[p]) for p in places)


def make_prompt(regions: tuple[Region, ...]) -> Prompt:
    """The prompt that asks for these regions, e.g. ``the words 'KEBA' at the top, 'LUX' at the bottom``."""
    parts = [f"'{r.word}' {'in' if r.place == 'middle' else 'at'} the {r.place}" for r in regions]
    text = f"the word{'s' if len(parts) > 1 else ''} " + ", ".join(parts)
    boxes = tuple(_region_box(r) for r in regions)
    return Prompt(text=text, words=tuple(r.word for r in regions), boxes=boxes)


def parse_prompt(text: str) -> tuple[Region, ...]:
    """The regions a prompt asks for.

    Raises:
        ValueError: if the text asks for nothing, for an unknown place, for two words at one place, for a word without a
            place, or for one that Inkling has no letters or no room for.
    """
    regions = tuple(Region(word, place) for word, place in _REGION.findall(text))
    if not regions:
        raise ValueError(
            f"Inkling's prompt {text!r} asks for no word; write for example: the words 'KEBA' at the top, "
            "'LUX' at the bottom"
        )
    for region in regions:
        if region.place not in PLACES:
            raise ValueError(f"Inkling's prompt {text!r} has place {region.place!r}; places are {', '.join(PLACES)}")
        bad = sorted(set(region.word) - set(ALPHABET))
        if bad or not MIN_LETTERS <= len(region.word) <= MAX_LETTERS:
            raise ValueError(
                f"Inkling cannot write {region.word!r}: words have {MIN_LETTERS} to {MAX_LETTERS} letters of {ALPHABET}"
            )
    placed = [r.word for r in regions]
    for word in _QUOTED.findall(text):
        if word not in placed:
            raise ValueError(f"Inkling's prompt {text!r} names no place for {word!r}")
    if len({r.place for r in regions}) < len(regions):
        raise ValueError(f"Inkling's prompt {text!r} names one place twice")
    return regions


def first_column(word: str) -> int:
    """The column of a word's first letter: words are centred, those of odd length half a cell to the left."""
    return (COLUMNS - len(word)) // 2


def _region_box(region: Region) -> Box:
    left, top = first_column(region.word) * CELL, ROWS[region.place] * CELL
    box = (left, top, left + len(region.word) * CELL, top + 2 * CELL)
    return tuple(round(v / PICTURE, 4) for v in box)  # type: ignore[return-value]


def layout(regions: tuple[Region, ...]) -> np.ndarray:
    """Which letter belongs in each cell: int64 [6, 6].

    0 for none; else 1 + twice the letter's index in ``ALPHABET``, plus 1 in the lower of its two cells.
    """
    letters = np.zeros((COLUMNS, COLUMNS), np.int64)
    for region in regions:
        start, row = first_column(region.word), ROWS[region.place]
        ids = np.array([1 + 2 * ALPHABET.index(c) for c in region.word])
        letters[row : row + 2, start : start + len(ids)] = np.stack([ids, ids + 1])
    return letters
