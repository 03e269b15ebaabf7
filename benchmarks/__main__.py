"""Speed and memory of the library, every number a ratio against a baseline of the same run.

python -m benchmarks                      the updates, what each saving gives, memory, share of the machine, OCR
python -m benchmarks --full --out performance.json --figures docs/figures        all sections, larger shapes
python -m benchmarks --only options --only scaling --device cuda
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from benchmarks import figures, fraction, ocr, options, peaks, savings, scaling, speed, updates
from benchmarks.measure import Row, Settings, machine, section_table
from varl.memory import keep_freed


class Section(NamedTuple):
    """What a section is called, what measures it, and what draws it."""

    title: str
    rows: Callable[[Settings, Path], list[Row]]
    draw: Callable[[Sequence[Row], Path], None] | None = None


SECTIONS = {
    "updates": Section(updates.TITLE, updates.rows, figures.stages),
    "savings": Section(savings.TITLE, savings.rows, figures.savings),
    "options": Section(options.TITLE, options.rows),
    "fraction": Section(fraction.TITLE, fraction.rows),
    "memory": Section(peaks.TITLE, peaks.rows),
    "scaling": Section(scaling.TITLE, scaling.rows),
    "sampler": Section(speed.TITLE, speed.rows),
    "ocr": Section(ocr.TITLE, ocr.rows),
}


SHORT = ("updates", "savings", "fraction", "memory", "scaling", "ocr")
"""What is measured if nothing is asked for: a few minutes on two cores."""


def parse(words: list[str] | None = None) -> tuple[Settings, list[str], Path | None]:
    """The settings, the sections and the file that the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="larger shapes, more rounds, all sections")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", action="append", choices=list(SECTIONS), help="a section; may be given several times")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write the numbers here")
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="also draw what is measured, here")
    parser.add_argument("--rounds", type=int, help="times everything is measured; by default 2, or 3 with --full")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args(words)
    if a.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, but torch sees no GPU; use cpu")
    rounds = (3 if a.full else 2) if a.rounds is None else a.rounds
    if min(rounds, a.threads) < 1:
        parser.error(f"--rounds and --threads must be 1 or more, got {rounds} and {a.threads}")
    names = a.only or list(SECTIONS if a.full else SHORT)
    return Settings(a.full, a.device, a.threads, a.seed, rounds, a.figures), names, a.out


def main(words: list[str] | None = None) -> dict[str, Any]:
    """Measure, print the tables, write the JSON; also returns what it holds."""
    settings, names, out = parse(words)
    logging.getLogger("varl").setLevel(logging.ERROR)
    torch.set_num_threads(settings.threads)
    if settings.device == "cpu":
        keep_freed()  # as in every run
    console = Console(width=150)
    about = machine(settings)
    console.print(about, settings)
    result: dict[str, Any] = {
        "machine": about,
        "settings": {name: value for name, value in vars(settings).items() if name != "figures"},
        "sections": {},
    }
    for name in names:
        section, start = SECTIONS[name], time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            rows = section.rows(settings, Path(folder))
        console.print(section_table(section.title, rows))
        if section.draw is not None and settings.figures is not None:
            section.draw(rows, settings.figures / f"performance-{name}.png")
        seconds = time.perf_counter() - start
        console.print(f"{name}: {seconds:.0f} s\n")
        result["sections"][name] = {"title": section.title, "seconds": seconds, "rows": [row.record() for row in rows]}
        if out is not None:  # after every section: a run that is stopped keeps what it has
            out.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
