"""Reading pictures: one by one, all in one call, and tiled to sheets; and what that does to the demo's update."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Row, Settings, generators, in_turn
from benchmarks.shapes import Bench, inkling
from varl.rewards.engine import Line, OcrConfig, OcrEngine
from varl.rollout import rollout

__all__ = ["TITLE", "read_sheets", "rows", "sheet"]

TITLE = "OCR: seconds for the same pictures (baseline / ours)"
GAP = 16
"""Pixels between the pictures of a sheet, so that lines of neighbours are not read as one."""


def rows(settings: Settings, folder: Path) -> list[Row]:
    """Pictures that Inkling drew."""
    count, side = (64, 4) if settings.full else (32, 4)
    trainer = Bench(inkling(1, settings.threads), settings, folder).trainer
    prompts = [prompt for _, prompt in trainer.stream.next(count)]
    condition = trainer.policy.condition(prompts)
    drawn = rollout(trainer.policy, condition, None, generators(trainer.policy, (settings.seed,), count))
    images = trainer.policy.decode(drawn.actions).float().cpu()
    together, alone = OcrEngine(OcrConfig(threads=settings.threads)), OcrEngine()
    large = OcrEngine(OcrConfig(threads=settings.threads, small_side=10**6))
    plain = together.read(images)
    same = np.mean([_words(a) == _words(b) for a, b in zip(plain, read_sheets(large, images, side), strict=True)])
    work = {
        "one by one": lambda: [alone.read(image[None]) for image in images],
        f"in one call, {settings.threads} threads": lambda: together.read(images),
        f"in sheets of {side}x{side}, {settings.threads} threads": lambda: read_sheets(large, images, side),
    }
    seconds = in_turn(work, settings)
    baseline = seconds["one by one"]
    group = f"{count} pictures of {images.shape[-1]} px"
    found = []
    for name, values in seconds.items():
        rate = f"{count / np.median(values):,.0f} pictures a second"
        note = f"; {same:.0%} of pictures read the same" if "sheets" in name else ""
        found.append(Row.speedup(group, name, values, baseline, rate + note))
    return found + _overlapped(settings, folder)


def _overlapped(settings: Settings, folder: Path) -> list[Row]:
    """The demo's prefix update, scored after it is drawn and while it is."""
    config = inkling(1, settings.threads)
    overlapped = replace(config, run=replace(config.run, overlap=True))
    benches = [Bench(c, settings, folder) for c in (config, overlapped)]
    work = {"after": lambda: benches[0].step("prefix"), "during": lambda: benches[1].step("prefix")}
    seconds = in_turn(work, settings)
    text = "scored when all is drawn / scored while the next part is"
    return [Row.speedup("the demo's update", "overlapped", seconds["during"], seconds["after"], text)]


def sheet(images_B3HW: Tensor, side: int) -> Tensor:
    """Up to side x side pictures on one sheet, [3, side * (H + GAP), side * (W + GAP)], their edges drawn out."""
    framed = F.pad(images_B3HW, (GAP // 2,) * 4, mode="replicate")
    count, _, height, width = framed.shape
    paper = framed.new_ones(side * side, 3, height, width)
    paper[:count] = framed
    return paper.unflatten(0, (side, side)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)


def read_sheets(engine: OcrEngine, images_B3HW: Tensor, side: int) -> list[list[Line]]:
    """The lines of every picture, read from sheets; polygons are left in pixels of the sheet."""
    parts = images_B3HW.split(side * side)
    readings = engine.read(torch.stack([sheet(part, side) for part in parts]))
    pitch = np.array(images_B3HW.shape[:1:-1]) + GAP
    found: list[list[Line]] = [[] for _ in images_B3HW]
    for number, lines in enumerate(readings):
        for line in cast(list[Line], lines):
            column, row = (line.polygon.mean(0) // pitch).astype(int).clip(0, side - 1)
            index = number * side * side + row * side + column
            if index < len(found):
                found[index].append(line)
    return found


def _words(reading: object) -> list[str]:
    return sorted(line.text.lower() for line in cast(list[Line], reading)) if isinstance(reading, list) else []
