"""Pictures of a run: samples with their rewards and propagated masks, and before against after."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from varl.policy import Prompt
from varl.rewards.ocr import word_hits
from varl.schedule import ScaleSchedule

__all__ = ["mask_overlay", "save_before_after", "save_gallery", "save_pictures"]

Color = tuple[int, int, int]
Run = tuple[str, Color]
"""A word and its colour."""

PAPER, CARD, EDGE = (240, 242, 245), (255, 255, 255), (214, 219, 226)
INK, FAINT = (28, 33, 43), (107, 114, 128)
HIT, MISS = (21, 128, 61), (200, 36, 44)
TINT = (255, 122, 0)
"""The colour of masked tokens."""
STRENGTH, DIMMED, LINE = 0.5, 0.45, 0.3
"""How much of a fully masked token is tint, the brightness that an unmasked one, made grey, keeps, and
how much of a grid line is white."""
SMALL, LARGE = 192, 256
"""Pictures are shown with a longer side of at least SMALL and at most LARGE pixels."""
MIN_CELL = 5
"""Cells narrower than this, in pixels, get no grid lines."""
SIZE, GAP, MIN_TEXT = 13, 8, 144
"""Type size, space between things, and the least width that text is set in, all in pixels."""


def save_gallery(
    path: str | Path,
    prompts: Sequence[Prompt],
    images: Tensor,
    rewards: Tensor,
    advantages: Tensor | None,
    texts: Sequence[str] | None,
    masks: Tensor | None,
    schedule: ScaleSchedule,
    columns: int | None = None,
    fold: bool = True,
) -> None:
    """Write a PNG of N samples: prompt, picture, reward, what was read, and the mask at every scale.

    A mask is drawn over the picture: masked tokens tinted orange (by their mask value), others dimmed grey, with the
    token grid where its cells are wide enough to see. Below a mask: its grid, and the share of tokens that are masked.

    Args:
        path: where to; its folder is made.
        prompts: N prompts, one a picture. Of their words, those read are green and those missed red.
        images: [N, 3, H, W] in [0, 1].
        rewards: [N]; one that is not finite is shown as failed.
        advantages: [N], or None.
        texts: what was read in each picture, or None.
        masks: [N, L] in [0, 1], the tokens of all steps of ``schedule``, coarse to fine; or None.
        schedule: the grids.
        columns: samples side by side; by default as many as fit in 1,700 pixels.
        fold: as the reward compares words, see ``varl.rewards.ocr.word_hits``.

    Raises:
        ValueError: if there is no picture, or shapes do not match.
    """
    count = _check_pictures(images, {"prompts": prompts, "rewards": rewards, "advantages": advantages, "texts": texts})
    if masks is not None and tuple(masks.shape) != (count, schedule.tokens):
        raise ValueError(f"masks must be [{count}, {schedule.tokens}] for this schedule, got {tuple(masks.shape)}")
    samples = []
    for i in range(count):
        picture = _pixels(images[i])
        shown = _show(picture)
        width = max(MIN_TEXT, shown.width)
        under = [_flow([("reward", FAINT), *_reward_runs(float(rewards[i]))], width, 1)]
        if advantages is not None:
            value = float(advantages[i])
            under.append(_flow([("advantage", FAINT), (f"{value:+.2f}", HIT if value > 0 else INK)], width, 1))
        under += _verdict(prompts[i], None if texts is None else texts[i], width, fold)
        body = [_stack([shown, *under], 4)]
        if masks is not None:
            body.append(_scales(picture, shown.size, masks[i].detach().float().cpu(), schedule))
        sample = _row(body, 2 * GAP)
        samples.append(_stack([_flow(_title(prompts[i]), sample.width, 2, bold=True), sample], GAP))
    columns = _columns(columns, count, samples[0].width)
    _save(_sheet(_equal_cards(samples), columns), path)


def save_before_after(
    path: str | Path,
    prompts: Sequence[Prompt],
    before_images: Tensor,
    after_images: Tensor,
    before_texts: Sequence[str],
    after_texts: Sequence[str],
    columns: int = 8,
    fold: bool = True,
) -> None:
    """Write a PNG of N prompts' pictures before training, and below them after.

    Under each picture the wanted words, green if they were read and red if not, and what was read. A picture all of
    whose words were read has a green edge.

    Args:
        path: where to; its folder is made.
        prompts: N prompts.
        before_images, after_images: [N, 3, H, W] in [0, 1].
        before_texts, after_texts: what was read in each picture.
        columns: prompts side by side; more go on below.
        fold: as the reward compares words, see ``varl.rewards.ocr.word_hits``.

    Raises:
        ValueError: if there is no picture, or shapes do not match.
    """
    count = _check_pictures(before_images, {"prompts": prompts, "before_texts": before_texts})
    _check_pictures(after_images, {"prompts": prompts, "after_texts": after_texts})
    columns = _columns(columns, count, 0)
    rows = []
    for first in range(0, count, columns):
        own = range(first, min(first + columns, count))
        sides = []
        for label, images, texts in (("before", before_images, before_texts), ("after", after_images, after_texts)):
            cells = [_judged(_show(_pixels(images[i])), prompts[i], texts[i], fold) for i in own]
            sides.append(_row([_sideways(label, cells[0].height), *cells], GAP))
        width = cells[0].width
        titles = [_flow(_title(prompts[i]), width, 3) for i in own]
        rows.append(_card(_stack([_row([_blank(SIZE + 6, 1), *titles], GAP), *sides], GAP)))
    _save(_sheet(rows, 1), path)


def save_pictures(path: str | Path, prompts: Sequence[Prompt], images: Tensor, columns: int | None = None) -> None:
    """Write a PNG of N pictures, each above its prompt.

    Args:
        path: where to; its folder is made.
        prompts: N prompts.
        images: [N, 3, H, W] in [0, 1].
        columns: pictures side by side; by default as many as fit in 1,700 pixels, at most 8.

    Raises:
        ValueError: if there is no picture, or shapes do not match.
    """
    count = _check_pictures(images, {"prompts": prompts})
    cells = []
    for i in range(count):
        shown = _show(_pixels(images[i]))
        cells.append(_stack([shown, _flow(_title(prompts[i]), max(MIN_TEXT, shown.width), 3)], 4))
    columns = _columns(columns, min(8, count), cells[0].width)
    _save(_sheet(_equal_cards(cells), columns), path)


def mask_overlay(picture: np.ndarray, mask_hw: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """A picture with a grid's mask drawn over it.

    Args:
        picture: [H, W, 3] uint8.
        mask_hw: [h, w] in [0, 1], one value a token.
        size: (width, height) of the result, in pixels.
    """
    width, height = size
    (h, w), base = mask_hw.shape, np.asarray(_resize(picture, size), np.float32)
    row, column = np.arange(height) * h // height, np.arange(width) * w // width
    mask = np.clip(mask_hw, 0, 1)[row][:, column][:, :, None].astype(np.float32)
    masked = base * (1 - STRENGTH) + np.array(TINT, np.float32) * STRENGTH
    dimmed = (base @ np.array([0.299, 0.587, 0.114], np.float32))[:, :, None] * DIMMED
    out = mask * masked + (1 - mask) * dimmed
    if height >= MIN_CELL * h and width >= MIN_CELL * w:
        line = np.zeros((height, width), bool)
        line[1:][row[1:] != row[:-1]] = True
        line[:, 1:][:, column[1:] != column[:-1]] = True
        out[line] = out[line] * (1 - LINE) + 255 * LINE
    return Image.fromarray(out.round().astype(np.uint8))


def _scales(picture: np.ndarray, shown: tuple[int, int], mask_L: Tensor, schedule: ScaleSchedule) -> Image.Image:
    """The masks of all steps over the picture at half its shown size, in two rows."""
    size = (shown[0] // 2, shown[1] // 2)
    tiles = []
    for step, (h, w) in enumerate(schedule.grids):
        mask = mask_L[schedule.tokens_of(step)].reshape(h, w).numpy()
        share = f"{h}×{w}  {mask.mean():.0%}"
        label = _flow([(share, FAINT)], max(size[0], MIN_TEXT // 2), 1, size=11)
        tiles.append(_stack([mask_overlay(picture, mask, size), label], 2))
    half = (len(tiles) + 1) // 2
    return _stack([_row(tiles[:half], GAP), *([_row(tiles[half:], GAP)] if tiles[half:] else [])], 6)


def _judged(shown: Image.Image, prompt: Prompt, text: str, fold: bool) -> Image.Image:
    hits = word_hits(prompt.words, [text], fold)
    framed = _blank(shown.width + 6, shown.height + 6, HIT if hits and all(hits) else CARD)
    framed.paste(shown, (3, 3))
    return _stack([framed, *_verdict(prompt, text, max(MIN_TEXT, framed.width), fold)], 3)


def _verdict(prompt: Prompt, text: str | None, width: int, fold: bool) -> list[Image.Image]:
    """Two blocks: the wanted words by whether they were read, and what was read."""
    if text is None:
        return []
    words, hits = " ".join(prompt.words).split(), word_hits(prompt.words, [text], fold)
    runs = [(word, HIT if hit else MISS) for word, hit in zip(words, hits, strict=True)]
    read = [(word, FAINT) for word in ["read", *text.split()]] if text.split() else [("nothing read", FAINT)]
    return ([_flow(runs, width, 2, bold=True)] if runs else []) + [_flow(read, width, 2, size=11)]


def _title(prompt: Prompt) -> list[Run]:
    text = prompt.text or (f"class {prompt.label}" if prompt.label is not None else "")
    return [(word, INK) for word in text.split()]


def _reward_runs(value: float) -> list[Run]:
    return [(f"{value:.3f}", INK)] if np.isfinite(value) else [("failed", MISS)]


def _check_pictures(images: Tensor, others: dict[str, Sequence[object] | Tensor | None]) -> int:
    if images.ndim != 4 or images.shape[1] != 3 or len(images) == 0:
        raise ValueError(f"images must be [N, 3, H, W] with N of at least 1, got shape {tuple(images.shape)}")
    for name, values in others.items():
        if values is not None and len(values) != len(images):
            raise ValueError(f"there are {len(images)} images, but {len(values)} {name}")
    return len(images)


def _columns(asked: int | None, most: int, width: int) -> int:
    """How many things of a width go side by side, if it was not said."""
    if asked is not None and asked < 1:
        raise ValueError(f"columns must be at least 1, got {asked}")
    return asked or max(1, min(most, 1700 // (width + 4 * GAP)))


def _equal_cards(blocks: Sequence[Image.Image]) -> list[Image.Image]:
    """Blocks as cards of the same height."""
    height = max(block.height for block in blocks)
    return [_card(_row([block, _blank(0, height)], 0)) for block in blocks]


def _pixels(image: Tensor) -> np.ndarray:
    """[3, H, W] in [0, 1] as [H, W, 3] uint8; what is not finite is black."""
    image = torch.nan_to_num(image.detach().float().cpu(), nan=0.0, posinf=0.0, neginf=0.0)
    return (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def _show(picture: np.ndarray) -> Image.Image:
    """The picture at the size it is shown: small ones enlarged by a whole even number, so that a half is exact."""
    height, width = picture.shape[:2]
    side = max(height, width)
    if side < SMALL:
        factor = 2 * -(-SMALL // (2 * side))
        return _resize(picture, (width * factor, height * factor))
    scale = min(1.0, LARGE / side)
    return _resize(picture, (max(2, round(width * scale)), max(2, round(height * scale))))


def _resize(picture: np.ndarray, size: tuple[int, int]) -> Image.Image:
    image = Image.fromarray(picture)
    larger = size[0] >= image.width and size[1] >= image.height
    return image.resize(size, Image.Resampling.NEAREST if larger else Image.Resampling.LANCZOS)


@lru_cache
def _font(size: int, bold: bool) -> ImageFont.FreeTypeFont:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts", "ttf", name), size)


def _flow(runs: Sequence[Run], width: int, lines: int, bold: bool = False, size: int = SIZE) -> Image.Image:
    """Words set in lines of a width; what does not fit in so many lines is cut with an ellipsis."""
    font = _font(size, bold)
    space, leading = font.getlength(" "), round(size * 1.35)
    placed: list[tuple[float, int, Run]] = []
    x, line = 0.0, 0
    for word, color in runs:
        if x and x + font.getlength(word) > width:
            if line + 1 == lines:
                while placed and placed[-1][0] + font.getlength(placed[-1][2][0] + " …") > width:
                    at, on, (last, its) = placed.pop()
                    if len(last) > 1:
                        placed.append((at, on, (last[:-1], its)))
                at, on, (last, its) = placed[-1]
                placed[-1] = (at, on, (last + " …", its))
                break
            x, line = 0.0, line + 1
        if font.getlength(word) > width:
            word = word[: 4 * width]  # no more could be seen, and measuring takes time
            while len(word) > 1 and font.getlength(word + "…") > width:
                word = word[:-1]
            word += "…"
        placed.append((x, line, (word, color)))
        x += font.getlength(word) + space
    block = _blank(width, (line + 1) * leading)
    draw = ImageDraw.Draw(block)
    for at, on, (word, color) in placed:
        draw.text((at, on * leading), word, color, font)
    return block


def _sideways(label: str, height: int) -> Image.Image:
    """A label that reads upward, as high as the row it names."""
    strip = _blank(height, SIZE + 6)
    ImageDraw.Draw(strip).text((height / 2, 0), label, FAINT, _font(SIZE, True), anchor="ma")
    return strip.transpose(Image.Transpose.ROTATE_90)


def _blank(width: int, height: int, color: Color = CARD) -> Image.Image:
    return Image.new("RGB", (width, height), color)


def _stack(blocks: Sequence[Image.Image], gap: int, color: Color = CARD) -> Image.Image:
    """Blocks one below another, at the left."""
    out = _blank(max(b.width for b in blocks), sum(b.height for b in blocks) + gap * (len(blocks) - 1), color)
    y = 0
    for block in blocks:
        out.paste(block, (0, y))
        y += block.height + gap
    return out


def _row(blocks: Sequence[Image.Image], gap: int, color: Color = CARD) -> Image.Image:
    """Blocks side by side, at the top."""
    out = _blank(sum(b.width for b in blocks) + gap * (len(blocks) - 1), max(b.height for b in blocks), color)
    x = 0
    for block in blocks:
        out.paste(block, (x, 0))
        x += block.width + gap
    return out


def _card(block: Image.Image) -> Image.Image:
    out = _blank(block.width + 3 * GAP, block.height + 3 * GAP, PAPER)
    box = (0, 0, out.width - 1, out.height - 1)
    ImageDraw.Draw(out).rounded_rectangle(box, GAP, CARD, EDGE)
    out.paste(block, (3 * GAP // 2, 3 * GAP // 2))
    return out


def _sheet(cards: Sequence[Image.Image], columns: int) -> Image.Image:
    rows = [_row(cards[i : i + columns], GAP, PAPER) for i in range(0, len(cards), columns)]
    inner = _stack(rows, GAP, PAPER)
    out = _blank(inner.width + 2 * GAP, inner.height + 2 * GAP, PAPER)
    out.paste(inner, (GAP, GAP))
    return out


def _save(sheet: Image.Image, path: str | Path) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, format="PNG", optimize=False)
