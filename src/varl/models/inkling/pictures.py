"""The pictures that Inkling learns from: words drawn on the fly in fonts that come with matplotlib."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from varl.models.inkling.text import CELL, PICTURE, ROWS, Region, first_column

__all__ = ["draw"]

FONTS = ("DejaVuSansMono-Bold.ttf", "DejaVuSansMono.ttf")
HEIGHTS = (11, 12)
WIDTH = 7
SHIFTS = (-1, 0, 1)
CONTRASTS = (0.45, 0.7)
TINT = 0.35


@lru_cache(maxsize=1024)
def _glyph(font: int, height: int, letter: str) -> np.ndarray:
    """Coverage of one letter, scaled to fill WIDTH x ``height`` pixels; float32 in [0, 1]."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / FONTS[font]
    face = ImageFont.truetype(str(path), 64)
    left, top, right, bottom = (int(v) for v in face.getbbox(letter))
    tile = Image.new("L", (right - left, bottom - top), 0)
    ImageDraw.Draw(tile).text((-left, -top), letter, fill=255, font=face)
    return np.asarray(tile.resize((WIDTH, height), Image.Resampling.BOX), np.float32) / 255


def _colours(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Paper and ink, each [3] in [0, 1]: one tint, two brightnesses, either of them the darker."""
    contrast = rng.uniform(*CONTRASTS)
    tint = rng.uniform(-TINT, TINT, 3)
    tint -= tint.mean()
    dark = rng.uniform(0.1, 0.9 - contrast)
    paper, ink = rng.permutation([dark, dark + contrast])
    return np.clip(paper + tint, 0, 1).astype(np.float32), np.clip(ink + tint, 0, 1).astype(np.float32)


def draw(regions: tuple[Region, ...], rng: np.random.Generator) -> np.ndarray:
    """Draw words in a random style: colours, font, height and small shifts.

    Returns:
        float32 [3, 48, 48] in [0, 1].
    """
    paper, ink = _colours(rng)
    font, height = int(rng.integers(len(FONTS))), int(rng.choice(HEIGHTS))
    alpha = np.zeros((PICTURE, PICTURE), np.float32)
    for region in regions:
        top = ROWS[region.place] * CELL + (2 * CELL - height) // 2 + int(rng.choice(SHIFTS))
        for i, letter in enumerate(region.word):
            left = (first_column(region.word) + i) * CELL
            alpha[top : top + height, left : left + WIDTH] = _glyph(font, height, letter)
    return paper[:, None, None] * (1 - alpha) + ink[:, None, None] * alpha
