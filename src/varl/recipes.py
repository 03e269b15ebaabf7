"""What is checked of a recipe before its YAML is parsed, and before its values are used."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

__all__ = [
    "check_nulls",
    "check_recipe",
    "check_words",
    "check_yaml",
    "parse_yaml",
    "read_yaml",
    "recipes_in",
    "split_recipes",
]

DEEPEST = 32


def recipes_in(words: Sequence[str]) -> list[Path]:
    """The files that a command line names by ``--config``; settings given there as JSON are none."""
    named = [after for word, after in pairwise(words) if word == "--config"]
    named += [word.removeprefix("--config=") for word in words if word.startswith("--config=")]
    return [Path(name) for name in named if not name.startswith("{")]


def split_recipes(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of a command line that give recipes (``--config`` and what follows), and the others."""
    recipes: list[str] = []
    own: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        is_recipe = word == "--config" or word.startswith("--config=") or before == "--config"
        (recipes if is_recipe else own).append(word)
    return recipes, own


def check_words(words: Sequence[str]) -> None:
    """Refuse values of a command line, mappings and lists, as those of a recipe.

    Raises:
        ValueError: naming the word.
    """
    for word in words:
        value = word.partition("=")[2] if word.startswith("--") else word
        if value.lstrip()[:1] in ("{", "["):
            try:
                check_yaml(value)
            except ValueError as error:
                if isinstance(error.__cause__, yaml.YAMLError):
                    continue  # a prompt may begin with a bracket
                raise ValueError(f"{word[:80]}: {error}") from error


def check_recipe(path: Path) -> None:
    """Refuse what makes a small YAML file endless or large, has it read other files, or says a thing twice.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: as ``check_yaml``, or if it is not UTF-8, or has a key ``config``.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no recipe {path}")
    try:
        keys = check_yaml(path.read_text(encoding="utf-8"))
        if "config" in keys:
            raise ValueError("a recipe has no key 'config'")
    except ValueError as error:
        raise ValueError(f"recipe {path}: {error}") from error


def read_yaml(path: Path) -> Any:
    """The content of a YAML file that may come from anyone.

    Raises:
        ValueError: as ``check_yaml``, or if it is not UTF-8.
    """
    return parse_yaml(path.read_text(encoding="utf-8"))


def parse_yaml(text: str) -> Any:
    """The value of a YAML text that may come from anyone.

    Raises:
        ValueError: as ``check_yaml``.
    """
    check_yaml(text)
    try:
        return yaml.safe_load(text)
    except Exception as error:  # a value that does not fit its tag fails in ways of its own
        raise ValueError(str(error) if isinstance(error, yaml.YAMLError) else repr(error)) from error


def check_yaml(text: str) -> set[str]:
    """Refuse text that is no YAML, uses aliases (``*name``), nests too deeply, or gives one key twice.

    Returns:
        The keys of all mappings, each by its full name: ``run``, ``run.out``.

    Raises:
        ValueError: with the line.
    """
    try:
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                line = event.start_mark.line + 1 if event.start_mark else "?"
                raise ValueError(f"line {line} has an alias *{event.anchor}; write it out")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise ValueError(f"it nests deeper than {DEEPEST} levels")
        root, lines = yaml.compose(text, yaml.SafeLoader), dict[str, int]()
        if root is not None:
            _note_keys(root, "", lines)
        return set(lines)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _note_keys(node: yaml.Node, path: str, lines: dict[str, int]) -> None:
    """Add the full names of a node's keys, with their lines."""
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            _note_keys(item, f"{path}[{number}].", lines)
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        name, line = f"{path}{key.value}", key.start_mark.line + 1
        if isinstance(key, yaml.ScalarNode):
            if name in lines:
                raise ValueError(f"line {line} gives {name} again, which line {lines[name]} has already")
            lines[name] = line
        _note_keys(value, f"{name}.", lines)


def check_nulls(kind: type, values: Mapping[str, Any], path: str = "") -> None:
    """Refuse null for settings that must have a value, and what is no section where one belongs.

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
        elif section := next((h for h in (hint, *get_args(hint)) if is_dataclass(h) and isinstance(h, type)), None):
            if is_dataclass(value):
                continue
            if not isinstance(value, Mapping):
                raise ValueError(f"{name} must be a mapping of settings, got {reprlib.repr(value)}")
            check_nulls(section, value, f"{name}.")
