"""Files of prompts: a prompt a line, JSON, and tables."""

from __future__ import annotations

import csv
import io
import json
import reprlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from varl.policy import Box, Prompt
from varl.prompts.quotes import quoted_words
from varl.strict_json import RepeatedKey, parse_json

__all__ = ["MOST_LABELS", "check_size", "load_prompts"]

MOST_LABELS = 1_000_000
MOST_CHARACTERS, MOST_WORDS, MOST_IN_WORD = 20_000, 256, 1_000
"""Of a prompt and of one wanted text; the text encoders read some hundred tokens."""
Placed = Iterator[tuple[str, Prompt]]
"""Prompts, each with the place where it stands, for messages."""
_FIELDS = ("text", "words", "boxes", "label")
_RIGHT = {
    ".json": 'CVTG-2K\'s format is {"data_list": [{"prompt": "... \'SALE\' ..."}, ...]}',
    ".jsonl": 'a line is for example {"text": "a sign that says \'SALE\'", "words": ["SALE"]}',
    ".csv": 'a table is for example the lines text,words and "a sign, red, and a door",SALE|OPEN',
    ".tsv": "a table is for example the lines text<tab>words and a sign and a door<tab>SALE|OPEN",
}


def load_prompts(path: str | Path) -> list[Prompt]:
    """Read a file of prompts (UTF-8); nothing in it is executed.

    - ``.txt``, or no ending: a prompt a line, blank lines left out; the wanted words are its ``quoted_words``.
    - ``.jsonl``: an object a line, with ``text``, and if wanted ``words`` (list of texts), ``boxes`` (one
      [left, top, right, bottom] a word, as fractions of the picture) and ``label`` (class index). Without ``words``,
      the quoted parts of the text are the wanted words; ``text`` may be missing where there is a label.
    - ``.csv`` and ``.tsv``: a table whose first line names its columns: ``text`` (or ``prompt``), ``words``, ``boxes``
      and ``label``, as above. Several words are separated by ``|``, or written as a JSON list; boxes are a JSON list.
      An empty cell is as a missing one.
    - ``.json``: CVTG-2K's format, ``{"data_list": [{"prompt": ...}, ...]}``; words as for text files.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file has another ending, is not UTF-8, holds no prompt, or a line or entry is not of its
            format, gives a key twice, or is longer than a prompt can be; the message names it.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no prompt file {path}")
    ending = path.suffix.lower()
    if ending not in _READERS:
        known = ", ".join(name for name in _READERS if name)
        raise ValueError(f"prompt file {path} has the ending {ending}; prompts are read from {known}")
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt file {path} is not UTF-8: {error}") from error
    prompts = []
    for where, prompt in _READERS[ending](content, path):
        check_size(prompt, where)
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"prompt file {path} holds no prompt")
    return prompts


def check_size(prompt: Prompt, where: str) -> None:
    """That a prompt is not longer than any encoder reads or any picture holds.

    Raises:
        ValueError: naming what is too long.
    """
    longest = max(map(len, prompt.words), default=0)
    for size, most, what in (
        (len(prompt.text), MOST_CHARACTERS, "characters"),
        (len(prompt.words), MOST_WORDS, "wanted words"),
        (longest, MOST_IN_WORD, "characters in one wanted text"),
    ):
        if size > most:
            raise ValueError(f"{where}: a prompt has at most {most:,} {what}, this one has {size:,}")


def _lines(content: str, path: Path) -> Iterator[tuple[str, str]]:
    # Not splitlines(): it also splits at characters such as U+2028, which may be inside a prompt.
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            yield f"{path}, line {number}", line.strip()


def _from_text(content: str, path: Path) -> Placed:
    for where, line in _lines(content, path):
        yield where, Prompt(line, quoted_words(line) if len(line) <= MOST_CHARACTERS else ())


def _from_jsonl(content: str, path: Path) -> Placed:
    for where, line in _lines(content, path):
        yield where, _from_object(_parse(line, where, ".jsonl"), where, ".jsonl")


def _from_table(content: str, path: Path) -> Placed:
    ending = path.suffix.lower()
    reader = csv.reader(io.StringIO(content, newline=""), "excel-tab" if ending == ".tsv" else "excel", strict=True)
    rows = ((f"{path}, line {reader.line_num}", row) for row in reader if any(cell.strip() for cell in row))
    try:
        names = _columns(*next(rows, (str(path), [])), ending)
        for where, row in rows:
            if len(row) != len(names):
                raise ValueError(f"{where}: {len(row)} cells in {len(names)} columns; {_RIGHT[ending]}")
            cells = {name: cell.strip() for name, cell in zip(names, row, strict=True) if cell.strip()}
            yield where, _from_object({n: _cell(n, c, where, ending) for n, c in cells.items()}, where, ending)
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}; {_RIGHT[ending]}") from error


def _columns(where: str, header: list[str], ending: str) -> list[str]:
    names = [name.strip().lower() for name in header]
    names = ["text" if name == "prompt" else name for name in names]
    wrong = sorted(set(names) - set(_FIELDS))
    if wrong or len(set(names)) < len(names) or not {"text", "label"} & set(names):
        shown = reprlib.repr(header)
        raise ValueError(
            f"{where}: the first line must name the columns, each once: text (or prompt), words, boxes, label; it is "
            f"{shown}; {_RIGHT[ending]}"
        )
    return names


def _cell(name: str, cell: str, where: str, ending: str) -> Any:
    if name == "text":
        return cell
    if name == "words" and not cell.startswith("["):
        return [word.strip() for word in cell.split("|")]
    try:
        return json.loads(cell)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {name} is not valid JSON: {reprlib.repr(cell)}; {_RIGHT[ending]}") from error


def _parse(content: str, where: str, suffix: str) -> Any:
    try:
        return parse_json(content)
    except RepeatedKey as error:
        raise ValueError(f"{where}: {error}; {_RIGHT[suffix]}") from error
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits, or nesting without end
        line = f", line {error.lineno}" if suffix == ".json" and isinstance(error, json.JSONDecodeError) else ""
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise ValueError(f"{where}{line}: not valid JSON ({reason}); {_RIGHT[suffix]}") from error


def _from_cvtg(content: str, path: Path) -> Placed:
    data = _parse(content, str(path), ".json")
    entries = data.get("data_list") if isinstance(data, dict) else None
    if not isinstance(entries, list):
        raise ValueError(f"{path} has no list 'data_list'; {_RIGHT['.json']}")
    for number, entry in enumerate(entries):
        text = entry.get("prompt") if isinstance(entry, dict) else None
        if not isinstance(text, str) or not _is_text(text) or not text.strip():
            raise ValueError(f"{path}, data_list[{number}] has no text 'prompt'; {_RIGHT['.json']}")
        yield f"{path}, data_list[{number}]", Prompt(text, quoted_words(text) if len(text) <= MOST_CHARACTERS else ())


def _from_object(data: Any, where: str, ending: str) -> Prompt:
    def need(good: bool, what: str) -> None:
        if not good:
            raise ValueError(f"{where}: {what}; {_RIGHT[ending]}")

    need(isinstance(data, dict), f"expected an object, got {type(data).__name__}")
    unknown = sorted(set(data) - set(_FIELDS))
    need(not unknown, f"unknown field {', '.join(unknown)} (fields are {', '.join(_FIELDS)})")
    text, label = data.get("text", ""), data.get("label")
    need(_is_text(text), f"text must be a string, got {reprlib.repr(text)}")
    is_label = isinstance(label, int) and not isinstance(label, bool) and 0 <= label < MOST_LABELS
    need(label is None or is_label, f"label must be a class index, got {reprlib.repr(label)}")
    need(bool(text.strip()) or label is not None, "there is neither a text nor a label")
    words = data.get("words")
    if words is None:
        words = quoted_words(text) if len(text) <= MOST_CHARACTERS else ()
    listed = isinstance(words, list | tuple) and all(_is_text(w) and w.strip() for w in words)
    need(listed, f"words must be a list of texts, got {reprlib.repr(words)}")
    boxes = data.get("boxes") or []
    need(isinstance(boxes, list) and all(map(_is_box, boxes)), "boxes must be a list of [left, top, right, bottom], "
         f"with 0 <= left < right <= 1 and 0 <= top < bottom <= 1, got {reprlib.repr(boxes)}")  # fmt: skip
    need(len(boxes) in (0, len(words)), f"there are {len(boxes)} boxes for {len(words)} words")
    typed: list[Box] = [(float(b[0]), float(b[1]), float(b[2]), float(b[3])) for b in boxes]
    return Prompt(text, tuple(words), tuple(typed), label)


def _is_text(value: Any) -> bool:
    """Whether it is a string without halves of surrogate pairs, which JSON can spell but nothing can write."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def _is_box(box: Any) -> bool:
    if not isinstance(box, list) or len(box) != 4:
        return False
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in box):
        return False
    left, top, right, bottom = box
    return 0 <= left < right <= 1 and 0 <= top < bottom <= 1


_READERS: dict[str, Callable[[str, Path], Placed]] = {
    "": _from_text,
    ".txt": _from_text,
    ".jsonl": _from_jsonl,
    ".json": _from_cvtg,
    ".csv": _from_table,
    ".tsv": _from_table,
}
"""What reads a file, by its ending."""
