"""What is checked of a recipe before its YAML is parsed, and before its values are used."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

__all__ = [
    "check_recipe",
    "check_settings",
    "check_words",
    "check_yaml",
    "parse_yaml",
    "read_yaml",
    "recipes_in",
    "split_recipes",
]

DEEPEST = 32
PLAIN = {f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null")}
"""What a YAML text may hold; tags, dates and merge keys (``<<``) are of other kinds."""


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


def check_words(words: Sequence[str], kind: type) -> None:
    """Refuse values of a command line, sections, mappings and lists, as those of a recipe.

    Args:
        kind: the dataclass of the command's configuration.

    Raises:
        ValueError: naming the word.
    """
    for word, after in pairwise([*words, ""]):
        name, given, value = word.removeprefix("--").partition("=") if word.startswith("--") else ("", "=", word)
        value = value if given else after
        whole = name == "config" and value.startswith("{")
        section = whole or _section_of(kind, name) is not None
        try:
            content = parse_yaml(value) if section else value
            if value.lstrip()[:1] in ("{", "["):
                check_yaml(value)
        except ValueError as error:
            if not section and isinstance(error.__cause__, yaml.YAMLError):
                continue  # a prompt may begin with a bracket
            raise ValueError(f"{word[:80]}: {error}") from error
        if whole or name.partition(".")[0] in get_type_hints(kind):
            check_settings(kind, content if whole else {name: content})


def check_recipe(path: Path, kind: type) -> None:
    """Refuse what makes a small YAML file endless or large, has it read other files, says a thing twice or in vain.

    Args:
        kind: the dataclass of the command's configuration.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: as ``check_yaml`` and ``check_settings``, or if it is not UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no recipe {path}")
    try:
        check_settings(kind, read_yaml(path))
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
        what = str(error) if isinstance(error, yaml.YAMLError) else repr(error)
        raise ValueError(f"it has a value that cannot be read: {what}") from error


def check_yaml(text: str) -> set[str]:
    """Refuse text that is no YAML, uses aliases (``*name``), tags, dates or merge keys (``<<``), nests too deeply, or
    gives one key twice.

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
    if node.tag not in PLAIN:
        line, found = node.start_mark.line + 1, reprlib.repr(node.value) if isinstance(node, yaml.ScalarNode) else ""
        raise ValueError(
            f"line {line} has {found or 'something'} of YAML's kind {node.tag.rpartition(':')[2]}; write out what is "
            "merged, put dates in quotes, and leave tags out"
        )
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            _note_keys(item, f"{path}[{number}].", lines)
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        name, line = f"{path}{key.value}", key.start_mark.line + 1
        _note_keys(key, f"{name}?", lines)
        if isinstance(key, yaml.ScalarNode):
            if name in lines:
                raise ValueError(f"line {line} gives {name} again, which line {lines[name]} has already")
            lines[name] = line
        _note_keys(value, f"{name}.", lines)


def _section(hint: Any) -> type | None:
    """The dataclass that a setting's type is, or may be beside None."""
    return next((h for h in (hint, *get_args(hint)) if is_dataclass(h) and isinstance(h, type)), None)


def _section_of(kind: type, name: str) -> type | None:
    """The dataclass of the section ``a.b`` of a configuration, if it is one."""
    section: type | None = kind
    for part in name.split("."):
        section = _section(get_type_hints(section).get(part)) if section else None
    return section


def check_settings(kind: type, values: Any, path: str = "") -> None:
    """Refuse settings that there are not, null for those that must have a value, and what is no section where one
    belongs: a section's text is never taken for the name of a file.

    Args:
        kind: the dataclass of a configuration.
        values: what was given for it: a mapping by the names of its fields (``a.b`` is field b of section a);
            dataclasses in it as they are, or as such mappings.

    Raises:
        ValueError: naming the setting.
    """
    if is_dataclass(values):
        return
    if not isinstance(values, Mapping):
        what = path.removesuffix(".") or "a recipe"
        raise ValueError(f"{what} must be a mapping of settings, got {reprlib.repr(values)}")
    hints = get_type_hints(kind)
    for key, value in values.items():
        first, _, rest = str(key).partition(".")
        if first not in hints:
            own = f"{path.removesuffix('.')} has" if path else "there are"
            raise ValueError(f"there is no setting {path}{str(key)[:80]}; {own} {', '.join(hints)}")
        name, hint = f"{path}{first}", hints[first]
        section = _section(hint)
        if rest:
            if section:
                check_settings(section, {rest: value}, f"{name}.")
        elif value is None:
            if type(None) not in get_args(hint):
                raise ValueError(f"{name} is null, but must have a value; leave it out for its default")
        elif section:
            check_settings(section, value, f"{name}.")
        elif value == "" and Path in (hint, *get_args(hint)):  # as a path it would be the current folder
            raise ValueError(f"{name} is empty; name a file or folder, or leave it out for its default")
