"""Pictures with words at known places, like the embedded model's: a short word a band on a plain colour."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

FONTS = ("DejaVuSans-Bold", "DejaVuSansMono-Bold", "DejaVuSans")
WORDS = ["OPEN", "CAFE", "SALE", "STOP", "EXIT", "BAKE", "MILK", "NEWS", "PARK", "TAXI"]
WORDS += ["BUS", "SHOP", "FISH", "TEA", "LUNCH", "BREAD", "HOTEL", "WATER", "MUSIC", "BOOKS"]


@dataclass
class Picture:
    """``image`` [3, H, W] in [0, 1]; ``boxes`` (left, top, right, bottom) of the words' ink, in pixels."""

    image: Tensor
    words: list[str]
    boxes: list[tuple[int, int, int, int]]


@cache
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf" / f"{name}.ttf"), size)


def draw(words: list[str], rng: random.Random, side: int = 64) -> Picture:
    """One to three words in the bands of a square picture."""
    while True:
        ground, ink = ([rng.randrange(256) for _ in range(3)] for _ in range(2))
        if abs(sum(ground) - sum(ink)) > 300:
            break
    image = Image.new("RGB", (side, side), tuple(ground))
    pen, boxes = ImageDraw.Draw(image), []
    for word, band in zip(words, sorted(rng.sample(range(3), len(words))), strict=True):
        name = rng.choice(FONTS)
        size = rng.choice([16, 17, 18, 19]) * side // 64
        while font(name, size).getbbox(word)[2] > side - 6:
            size -= 1
        left, top, right, bottom = font(name, size).getbbox(word)
        x = rng.randint(2, int(side - 2 - (right - left)))
        y = round(band * side / 3 + (side / 3 - (bottom - top)) / 2)
        pen.text((x - left, y - top), word, font=font(name, size), fill=tuple(ink))
        boxes.append((x, y, int(x + right - left), int(y + bottom - top)))
    return Picture(torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255, words, boxes)


def draw_many(count: int, seed: int = 0, side: int = 64) -> list[Picture]:
    rng = random.Random(seed)
    return [draw([rng.choice(WORDS) for _ in range(1 + i % 3)], rng, side) for i in range(count)]


def stack(pictures: list[Picture]) -> Tensor:
    return torch.stack([picture.image for picture in pictures])
