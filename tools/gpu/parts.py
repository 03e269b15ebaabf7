"""The parts of a day, in their order, and how one is run: the only place that lists them.

python -m tools.gpu.parts list [--small]        number and limit of each, a line each
python -m tools.gpu.parts clear --out FOLDER    remove all that an earlier day left there
python -m tools.gpu.parts run 2 --device cuda --out FOLDER [--small] [--install]
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from tools.gpu.install import install

__all__ = ["FILES", "PARTS", "Part", "command", "main"]


class Part(NamedTuple):
    """One part of a day: a command that writes a file of JSON, and exits with 0 if all it checks holds."""

    number: int
    title: str
    seconds: int
    """It is ended after these."""
    file: str
    words: str
    """After ``python -m``; ``{device}``, ``{out}`` (a folder) and ``{file}`` are filled in, word by word."""
    small: str = ""
    """Words that a rehearsal adds."""
    figure: str | None = None


PARTS = (
    Part(
        1,
        "Installation, versions and ceilings",
        60,
        "1-machine.json",
        "tools.gpu.machine --device {device} --out {file}",
    ),
    Part(
        2,
        "Tests against the CPU's numbers",
        150,
        "2-tests.json",
        "pytest -m gpu tests/gpu -p no:cacheprovider --gpu-device {device} --gpu-report {file}",
    ),
    Part(
        3,
        "Training to the end",
        120,
        "3-train.json",
        "tools.gpu.train --device {device} --out {out}",
        small="--small",
        figure="before_after.png",
    ),
    Part(
        4,
        "Real sizes with random weights",
        180,
        "4-sizes.json",
        "tools.gpu.sizes --device {device} --machine {out}/1-machine.json --out {file}",
        small="--small",
    ),
    Part(5, "Benchmarks", 60, "5-benchmarks.json", "benchmarks --device {device} --short --out {file}"),
)

REHEARSED = 2
"""A rehearsal gives each part so many times its limit: what it runs on may be slow, or busy."""

FILES = ("day.md", "day.log", *(name for part in PARTS for name in (part.file, part.figure) if name))
"""All that a day leaves."""


def command(part: Part, device: str, out: Path, small: bool) -> list[str]:
    """The words that run a part."""
    given = {"device": device, "out": str(out), "file": str(out / part.file)}
    words = [*part.words.split(), *(part.small.split() if small else [])]
    return [sys.executable, "-m", *(word.format(**given) for word in words)]


def main(words: list[str] | None = None) -> int:
    """Do what is asked; a part that is run passes, with status 0, if its command does and its files are there."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.parts", description="List the parts, or run one.")
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("list").add_argument("--small", action="store_true", help="those of a rehearsal")
    actions.add_parser("clear").add_argument("--out", required=True, type=Path)
    run = actions.add_parser("run")
    run.add_argument("number", type=int, choices=[part.number for part in PARTS])
    run.add_argument("--device", required=True, choices=("cuda", "cpu"))
    run.add_argument("--out", required=True, type=Path)
    run.add_argument("--small", action="store_true")
    run.add_argument("--install", action="store_true", help="first install what is missing")
    a = parser.parse_args(words)
    if a.action == "list":
        factor = REHEARSED if a.small else 1
        print("\n".join(f"{part.number} {factor * part.seconds}" for part in PARTS))
    elif a.action == "clear":
        for name in FILES:
            (a.out / name).unlink(missing_ok=True)
    else:
        return _run(next(part for part in PARTS if part.number == a.number), a.device, a.out, a.small, a.install)
    return 0


def _run(part: Part, device: str, out: Path, small: bool, installs: bool) -> int:
    names = [name for name in (part.file, part.figure) if name]
    for name in names:
        (out / name).unlink(missing_ok=True)
    # ``timeout`` asks the whole group to end, but waits for this process alone: so this one waits for the others.
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    installed = install() if installs else True
    ended = subprocess.run(command(part, device, out, small)).returncode if not asked else 1
    lacking = [name for name in names if not (out / name).is_file()]
    for said in (f"part {part.number} did not write {name}" for name in lacking):
        print(said, flush=True)
    if ended < 0:
        print(f"part {part.number} was ended by signal {-ended}, {signal.Signals(-ended).name}", flush=True)
    return int(ended != 0 or bool(lacking) or not installed)


if __name__ == "__main__":
    sys.exit(main())
