"""Every setting of every command has a default and an explanation of its own, which ``--help`` shows next to it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import lru_cache
from typing import get_args, get_type_hints

import pytest

from varl.cli import COMMANDS, _parser

SHORTEST = 10
"""Characters of an explanation: "the model." has as many."""


def tree(config: type) -> set[type]:
    """A configuration and those within it."""
    hints = get_type_hints(config).values()
    inner = [kind for hint in hints for kind in (hint, *get_args(hint)) if is_dataclass(kind)]
    return {config}.union(*(tree(kind) for kind in inner))


CONFIGS = sorted(set().union(*(tree(command.config) for command in COMMANDS.values())), key=lambda kind: kind.__name__)


def entries(docstring: str | None) -> dict[str, str]:
    """What a docstring lists under ``Attributes``, each explanation on one line."""
    listed = inspect.cleandoc(docstring or "").partition("Attributes:\n")[2]
    parts = re.split(r"^    (\w+):", listed, flags=re.MULTILINE)[1:]
    return {name: " ".join(about.split()) for name, about in zip(parts[::2], parts[1::2], strict=True)}


def explanations(config: type) -> dict[str, str]:
    """Of a configuration's settings, those that it has from the one it extends among them."""
    kinds = [kind for kind in reversed(config.__mro__) if is_dataclass(kind)]
    return {name: about for kind in kinds for name, about in entries(kind.__doc__).items()}


def complaints(config: type, found: Mapping[str, str]) -> set[str]:
    """Settings that are not explained in words of their own, and names explained that are no settings."""
    said = list(found.values())
    poor = {
        name
        for name, about in found.items()
        if len(about) < SHORTEST or len(about.split()) < 2 or said.count(about) > 1
    }
    return poor | ({field.name for field in fields(config)} ^ set(found))


def settings(config: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names as on the command line, ``method.mask.enabled``, and explanations."""
    hints, found = get_type_hints(config), explanations(config)
    for field in fields(config):
        name = prefix + field.name
        if is_dataclass(hints[field.name]):
            yield from settings(hints[field.name], f"{name}.")
        yield name, found[field.name]


@lru_cache
def shown(command: str) -> str:
    """What ``varl COMMAND --help`` prints, on one line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "10000")
        return " ".join(_parser(command, COMMANDS[command]).format_help().split())


def is_shown(text: str, name: str, about: str) -> bool:
    """After the setting's name; of a group of settings, as the heading before it."""
    own, said = f" --{re.escape(name)}", re.escape(about)
    title = re.escape(about.removesuffix("."))
    return re.search(rf"{own} \S+( --\S+ \S+)* {said} \(| {title}:{own} CONFIG ", text) is not None


@pytest.mark.parametrize("config", CONFIGS)
def test_every_setting_is_explained(config: type) -> None:
    assert not complaints(config, explanations(config))


@pytest.mark.parametrize("config", CONFIGS)
def test_an_explanation_that_is_deleted_or_says_nothing_is_missed(config: type) -> None:
    whole = explanations(config)
    for name in whole:
        assert complaints(config, {key: about for key, about in whole.items() if key != name}) == {name}
        another = next(about for key, about in whole.items() if key != name)
        for poor in ("", "x", name, another):
            assert name in complaints(config, whole | {name: poor}), poor


def test_a_docstring_without_an_entry_explains_it_no_more() -> None:
    """Also a setting whose name other explanations use, as ``group`` and ``update`` are."""
    for config in CONFIGS:
        text = inspect.cleandoc(config.__doc__ or "")
        for name in entries(text):
            without = re.sub(rf"^    {name}:.*(\n     .*)*", "", text, flags=re.MULTILINE)
            assert entries(text).keys() - entries(without).keys() == {name}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_setting_has_a_default_and_help_explains_it(command: str) -> None:
    COMMANDS[command].config()
    found = dict(settings(COMMANDS[command].config))
    assert len(found) > 10
    assert not {name for name, about in found.items() if not is_shown(shown(command), name, about)}


def test_help_that_does_not_explain_a_setting_is_missed() -> None:
    text = shown("train")
    for name, about in settings(COMMANDS["train"].config):
        without = text.replace(f" {about} (", " (").replace(f" {about.removesuffix('.')}: --", " options: --")
        assert not is_shown(without, name, about), name
