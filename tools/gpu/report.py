"""The table of a day, made anew from whatever its parts have left so far.

python -m tools.gpu.report FOLDER                                          write FOLDER/day.md
python -m tools.gpu.report FOLDER --part 2 --code 0 --seconds 93           first note how a part ended
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.gpu.parts import PARTS, Part

__all__ = ["main", "note", "outcome", "report"]

ROWS = 80
"""Rows of one table at most; the rest is in the part's file."""
Found = dict[str, Any]


def main(words: list[str] | None = None) -> None:
    """Note how a part ended, if that is given, and print it in a line; then write the report."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.report", description="Write the table of a day.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--part", type=int, choices=[part.number for part in PARTS])
    parser.add_argument("--code", type=int, default=0, help="the exit status of the part")
    parser.add_argument("--seconds", type=float, default=0)
    a = parser.parse_args(words)
    if a.part is not None:
        part = next(part for part in PARTS if part.number == a.part)
        note(a.folder, part, a.code, a.seconds)
        print(f"part {part.number}, {part.title}: {outcome(a.code, a.seconds)}, {a.seconds:.0f} s of {part.seconds}")
    _write(a.folder / "day.md", report(a.folder))


def note(folder: Path, part: Part, code: int, seconds: float) -> None:
    """Add to a part's file, made if need be, how the part ended."""
    found = read(folder, part) or {}
    found["day"] = {"result": outcome(code, seconds), "seconds": round(seconds, 1)}
    _write(folder / part.file, json.dumps(found, indent=1) + "\n")


def outcome(code: int, seconds: float) -> str:
    """An exit status in words; 124 and 137 are what ``timeout`` gives."""
    if code in (124, 137):
        return f"failed: ended after {seconds:.0f} s"
    return {0: "passed", 130: "interrupted"}.get(code, "failed")


def read(folder: Path, part: Part) -> Found | None:
    """What a part wrote; None if it wrote nothing, and a note of it if that cannot be read."""
    path = folder / part.file
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
    except ValueError:
        return {"unreadable": "the part did not write its file to the end"}
    return found if isinstance(found, dict) else {"found": found}


def report(folder: Path) -> str:
    """The report in Markdown: card, date and versions, a row for each part, and the figures of each."""
    found = {part.number: read(folder, part) for part in PARTS}
    lines = [*_heading(found.get(1) or {}), "", "| part | | result | seconds | limit |", "|---|---|---|---|---|"]
    for part in PARTS:
        ended = _ended(found[part.number])
        lines.append(f"| {part.number} | {part.title} | {ended['result']} | {ended['seconds']} | {part.seconds} |")
    for part in PARTS:
        figures = {key: value for key, value in (found[part.number] or {}).items() if key != "day"}
        if figures:
            lines += ["", f"## {part.number}. {part.title}", *_tables(figures, part.file)]
    return "\n".join([*lines, ""])


def _heading(machine: Found) -> list[str]:
    """Card, date and versions, as far as part 1 found them."""
    card, versions = machine.get("card") or {}, machine.get("versions") or {}
    date = str(machine.get("date", "an unknown date"))[:10]
    names = ("varl", "python", "torch", "cuda", "cudnn", "nccl", "driver", "transformers", "numpy")
    shown = [f"{name} {versions[name]}" for name in names if versions.get(name)]
    said = ", ".join(shown) or "Part 1 has not said what the machine has."
    return [f"# {card.get('name', 'An unknown card')}, {date}", "", said]


def _ended(found: Found | None) -> Mapping[str, Any]:
    if found is None:
        return {"result": "not run", "seconds": ""}
    return found.get("day") or {"result": "failed: it has not ended", "seconds": ""}


def _tables(value: Mapping[str, Any], file: str, above: str = "") -> Iterator[str]:
    """Any JSON object as tables: its single values in one, then one for each object or list in it, with its name."""
    single = {key: each for key, each in value.items() if not _nested(each)}
    yield from _table([{"": key, "value": each} for key, each in single.items()], file)
    for key, each in value.items():
        name = f"{above}{key}"
        if isinstance(each, Mapping) and each:
            yield from ["", f"**{name}**"]
            alike = all(isinstance(inner, Mapping) for inner in each.values())
            yield from _side_by_side(each, file) if alike else _tables(each, file, f"{name}, ")
        elif isinstance(each, list) and _nested(each):
            yield from ["", f"**{name}**"]
            yield from _table([row if isinstance(row, Mapping) else {"": row} for row in each], file)


def _side_by_side(value: Mapping[str, Mapping[str, Any]], file: str) -> Iterator[str]:
    """Objects of one kind as the columns of a table; of what is in them deeper, all but long lists."""
    rows: dict[str, dict[str, Any]] = {}
    for column, each in value.items():
        for key, single in _singles(each):
            rows.setdefault(key, {"": key})[column] = single
    yield from _table(list(rows.values()), file)


def _singles(value: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """The single values in an object, each under the keys that lead to it."""
    for key, each in value.items():
        if isinstance(each, Mapping):
            yield from _singles(each, f"{above}{key}, ")
        elif not _nested(each):
            yield f"{above}{key}", each


def _nested(value: Any) -> bool:
    """Whether a value needs more than a cell."""
    inside = value if isinstance(value, list) else []
    return isinstance(value, Mapping) or any(isinstance(each, (Mapping, list)) for each in inside)


def _table(rows: Sequence[Mapping[str, Any]], file: str) -> Iterator[str]:
    """Rows under the names that any of them has, in the order of appearance."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    if not names:
        return
    yield from ["", "| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows[:ROWS]:
        yield "| " + " | ".join(_cell(row.get(name, "")) for name in names) + " |"
    if len(rows) > ROWS:
        yield from ["", f"{len(rows) - ROWS} more rows are in {file}."]


def _cell(value: Any) -> str:
    """A value in a cell: numbers to four digits, lists joined, and nothing that would end the cell."""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    if value is None or isinstance(value, bool):
        return {None: "-", True: "yes", False: "no"}[value]
    if isinstance(value, Mapping):
        return _cell([f"{key} {_cell(each)}" for key, each in value.items()])
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    return " ".join(str(value).split()).replace("|", "\\|")[:300]


def _write(path: Path, text: str) -> None:
    """All of it or nothing."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


if __name__ == "__main__":
    main()
