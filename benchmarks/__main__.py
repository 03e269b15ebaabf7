"""Speed and memory of the library, every number a ratio against a baseline of the same run.

python -m benchmarks                      the updates, what each saving gives, memory, share of the machine, OCR
python -m benchmarks --full --out performance.json --figures docs/figures        all sections, larger shapes
python -m benchmarks --only options --only scaling --device cuda
python -m benchmarks --short --device cuda --out performance.json   what a minute tells, compiled blocks among it
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from benchmarks import compiled, figures, fraction, ocr, options, peaks, savings, scaling, speed, updates
from benchmarks.compiled import compiler
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
    "compiled": Section(compiled.TITLE, compiled.rows),
    "fraction": Section(fraction.TITLE, fraction.rows),
    "memory": Section(peaks.TITLE, peaks.rows),
    "scaling": Section(scaling.TITLE, scaling.rows),
    "sampler": Section(speed.TITLE, speed.rows),
    "ocr": Section(ocr.TITLE, ocr.rows),
}


DEFAULT = ("updates", "savings", "fraction", "memory", "scaling", "ocr")
"""What is measured if nothing is asked for: a few minutes on two cores."""
SHORT = ("updates", "savings", "compiled")
"""What a short run measures; compiling comes last, for it takes the longest."""


def parse(words: list[str] | None = None) -> tuple[Settings, list[str], Path | None]:
    """The settings, the sections and the file that the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="larger shapes, more rounds, all sections")
    size.add_argument("--short", action="store_true", help="one shape and a few sections, in a minute; larger on a GPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", action="append", choices=list(SECTIONS), help="a section; may be given several times")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write the numbers here")
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="also draw what is measured, here")
    parser.add_argument("--rounds", type=int, help="times everything is measured; by default 2, with --full 3")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args(words)
    if a.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, but torch sees no GPU; use cpu")
    rounds = (3 if a.full else 2) if a.rounds is None else a.rounds
    if min(rounds, a.threads) < 1:
        parser.error(f"--rounds and --threads must be 1 or more, got {rounds} and {a.threads}")
    names = a.only or list(SECTIONS if a.full else SHORT if a.short else DEFAULT)
    return Settings(a.full, a.device, a.threads, a.seed, rounds, a.figures, a.short), names, a.out


def main(words: list[str] | None = None) -> dict[str, Any]:
    """Measure, print the tables, write the JSON; also returns what it holds.

    A section that fails costs the others nothing: why it did is under ``failed``, and what it printed in the log.
    """
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
        "left_out": {},
        "failed": {},
    }

    def write() -> None:  # around every section: a run that is stopped keeps what it has
        if out is not None:
            partial = out.with_name(out.name + ".new")
            partial.write_text(json.dumps(result, indent=1) + "\n")
            os.replace(partial, out)

    for name in names:
        if (why := _left_out(name, settings)) is not None:
            console.print(f"{name}: left out, {why}\n")
            result["left_out"][name] = why
            continue
        result["under_way"] = name
        write()
        section, start = SECTIONS[name], time.perf_counter()
        try:
            with tempfile.TemporaryDirectory() as folder:
                rows = section.rows(settings, Path(folder))
        except Exception as error:
            console.print_exception()
            result["failed"][name] = f"{type(error).__name__}: {error}"
            continue
        console.print(section_table(section.title, rows))
        if section.draw is not None and settings.figures is not None:
            section.draw(rows, settings.figures / f"performance-{name}.png")
        seconds = time.perf_counter() - start
        console.print(f"{name}: {seconds:.0f} s\n")
        result["sections"][name] = {"title": section.title, "seconds": seconds, "rows": [row.record() for row in rows]}
    result["under_way"] = None
    write()
    return result


def _left_out(name: str, settings: Settings) -> str | None:
    """Why a section cannot be measured here, if it cannot."""
    if name == "compiled" and compiler(settings.device) is None:
        language = "C++" if settings.device == "cpu" else "C"
        return f"blocks are compiled with a {language} compiler, and there is none"
    return None


if __name__ == "__main__":
    sys.exit(1 if main()["failed"] else 0)
