"""What is checked of a recipe before its YAML is parsed, and before its values are used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

__all__ = ["check_nulls", "check_recipe", "recipes_in"]

DEEPEST = 32


def recipes_in(words: Sequence[str]) -> list[Path]:
    """The files that a command line names by ``--config``; settings given there as JSON are none."""
    named = [after for word, after in pairwise(words) if word == "--config"]
    named += [word.removeprefix("--config=") for word in words if word.startswith("--config=")]
    return [Path(name) for name in named if not name.startswith("{")]


def check_recipe(path: Path) -> None:
    """Refuse what makes a small YAML file endless or large, or has it read other files.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not UTF-8 or YAML, uses aliases (``*name``), nests too deeply, or has a key ``config``.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no recipe {path}")
    try:
        depth, key = 0, ""
        for event in yaml.parse(path.read_text(encoding="utf-8"), yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(f"line {event.start_mark.line + 1} has an alias *{event.anchor}; write it out")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise ValueError(f"it nests deeper than {DEEPEST} levels")
            if isinstance(event, yaml.ScalarEvent) and depth == 1 and event.value == "config":
                key = event.value
        if key:
            raise ValueError("a recipe has no key 'config'")
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"recipe {path}: {error}") from error


def check_nulls(kind: type, values: Mapping[str, Any], path: str = "") -> None:
    """Refuse null for settings that must have a value.

    Args:
        kind: the dataclass of a configuration.
        values: what was parsed for it, by the names of its fields; dataclasses in it as mappings of their own.

    Raises:
        ValueError: naming the setting.
    """
    hints = get_type_hints(kind)
    for field in fields(kind):
        value, hint, name = values.get(field.name), hints[field.name], f"{path}{field.name}"
        if value is None:
            if field.name in values and type(None) not in get_args(hint):
                raise ValueError(f"{name} is null, but must have a value; leave it out for its default")
        elif is_dataclass(hint) and isinstance(value, Mapping) and isinstance(hint, type):
            check_nulls(hint, value, f"{name}.")
