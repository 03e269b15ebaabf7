"""Every block of code in the README and in docs/ is run, or, where it would take long, read as it would be when run."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import varl
from varl.cli import COMMANDS, _settings
from varl.policy import Prompt
from varl.rewards import RewardOutput, _Calling, check_reward, load_reward
from varl.rewards.checks import MOST_CHARACTERS, MOST_POINTS
from varl.rewards.engine import OcrConfig
from varl.rewards.ocr import OcrReward

ROOT = Path(__file__).parents[1]
PAGES = {path.name: path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}


def blocks(language: str, page: str | None = None) -> list[tuple[str, str]]:
    """(page, code) of every block in a language."""
    pages = PAGES if page is None else {page: PAGES[page]}
    return [(n, code) for n, text in pages.items() for code in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)]


def command_lines() -> list[tuple[str, str]]:
    """(page, line) of every command in the shell blocks, continued lines joined, variables filled in."""
    found = []
    variables: dict[str, str] = {}
    for page, code in blocks("sh"):
        for line in code.replace("\\\n", " ").splitlines():
            if assigned := re.fullmatch(r'([A-Z0-9]+)=("[^"]*"|\S+)(\s*#.*)?', line):
                variables[assigned[1]] = assigned[2].strip('"')
            elif line.strip() and not line.startswith("#"):
                for name, value in variables.items():
                    line = line.replace(f"${name}", value)
                found.append((page, line))
    return found


def varl_commands() -> list[tuple[str, list[str]]]:
    """(page, words) of every varl command, torchrun's too; a recipe that is to be made or chosen is one of ours."""
    found = []
    for page, line in command_lines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["torchrun"]:
            words = words[words.index("-m") + 1 :]
        if words[:1] == ["varl"]:
            stand_in = {"RECIPE": "recipes/var-d16.yaml", "checkpoints/tiny/recipe.yaml": "recipes/var-d16.yaml"}
            found.append((page, [stand_in.get(word.strip("[]"), word) for word in words[1:]]))
    return found


def test_every_language_is_known() -> None:
    for page, text in PAGES.items():
        opened = re.findall(r"^```(\S*)$", text, re.MULTILINE)
        assert opened[1::2] == [""] * (len(opened) // 2), page
        assert set(opened[::2]) <= {"python", "yaml", "sh", "text"}, page
    assert len(varl_commands()) > 20


@pytest.mark.parametrize(("page", "words"), varl_commands(), ids=str)
def test_commands_are_what_their_parsers_take(page: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    command = COMMANDS[words[0]]
    assert isinstance(_settings(words[0], command, words[1:]), command.config), page


def test_modules_that_commands_run_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    named = {line.split("-m ", 1)[1].split()[0] for _, line in command_lines() if "python -m " in line}
    assert {"benchmarks.results", "examples.tiny_var"} <= named
    for name in named:
        assert importlib.util.find_spec(name) is not None, name


def test_the_readmes_python() -> None:
    ((_, code),) = blocks("python", "README.md")
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["pictures"].shape == (8, 3, 48, 48)
    assert 0 <= names["pictures"].min() <= names["pictures"].max() <= 1
    assert names["scores"].logp.shape == names["whole"].actions.shape[:2]


def test_how_a_published_checkpoint_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files are not here: what would be done with them is."""
    from varl.models.infinity.config import read_config

    ((_, code),) = blocks("python", "models.md")
    calls = []

    def loaded(*given: Any, **named: Any) -> None:
        calls.append(inspect.signature(real).bind(*given, **named).arguments)

    real = varl.load_policy
    monkeypatch.setattr(varl, "load_policy", loaded)
    exec(compile(code, "models.md", "exec"), {"varl": varl})
    (call,) = calls
    assert importlib.import_module(varl.models.FAMILIES[call["family"]]).load
    assert read_config(call["config"]).pn == "0.25M"
    assert set(call["weights"]) == {"transformer", "tokenizer", "text_encoder"}


@pytest.fixture
def my_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    ((_, code),) = blocks("python", "rewards.md")
    (tmp_path / "my_rewards.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield
    sys.modules.pop("my_rewards", None)


def test_the_rewards_that_the_page_writes(my_rewards: None) -> None:
    images = torch.zeros(2, 3, 16, 16)
    images[0, 0] = 0.5
    images[1, 2] = 0.5
    prompts = [Prompt("red"), Prompt("blue")]
    specs = [yaml.safe_load(code)["reward"] for _, code in blocks("yaml", "rewards.md")]
    outputs = []
    for spec in specs:
        reward = load_reward(spec)
        check_reward(reward, prompts)
        outputs.append(reward(images, prompts))
        assert not outputs[-1].failed.any(), getattr(reward, "failures", None)
    assert outputs[0].score.tolist() == [0.5, -0.5]
    assert outputs[1].score.tolist() == [1.0, -1.0]  # strictness 0.5
    assert outputs[1].parts["warm"].tolist() == [1, 0]
    assert outputs[1].regions is not None
    assert outputs[1].regions[0][0].shape == (4, 2)
    assert reward.describe()["version"] == "1"
    with pytest.raises(ValueError, match="every prompt needs a text"):
        check_reward(reward, [Prompt()])


def table(page: str, title: str) -> dict[str, str]:
    """First column to second of the table whose head begins with a title."""
    rows = PAGES[page].split(f"| {title} |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    return {row.split("|")[1].strip(" `"): row.split("|")[2].strip(" `") for row in rows}


def test_the_fields_of_an_output_are_those_that_the_page_names() -> None:
    assert list(table("rewards.md", "field")) == [one.name for one in fields(RewardOutput)]
    given = {"score": torch.ones(1), "regions": [[]], "parts": {"a": torch.ones(1)}, "texts": [""]}
    for name in table("rewards.md", "field"):  # each with no other but the score
        RewardOutput(**{key: given.get(key, torch.zeros(1, dtype=torch.bool)) for key in {"score", name}})
    assert f"{MOST_POINTS:,} points" in PAGES["rewards.md"]
    assert f"{MOST_CHARACTERS:,} characters" in PAGES["rewards.md"]


def test_the_options_of_rewards_are_those_that_the_page_names() -> None:
    named = table("rewards.md", "option of every Python reward")
    defaults = {one.name: one.default for one in fields(_Calling)}
    assert {name: yaml.safe_load(value.replace("none", "null")) for name, value in named.items()} == defaults

    named = table("rewards.md", "option")
    parameters = inspect.signature(OcrReward).parameters
    assert named.keys() == parameters.keys()
    for name, value in named.items():
        shown = yaml.safe_load(value.replace("none", "null"))
        default = parameters[name].default
        assert (float(shown) if name == "eps" else shown) == ({} if name == "engine" else default), name
    engine = re.search(r"\| `engine` \|.*", PAGES["rewards.md"])
    assert engine is not None
    settings = set(re.findall(r"`(\w+)`", engine[0])) - {"engine"}
    assert settings
    assert settings <= {one.name for one in fields(OcrConfig)}
    assert all(one.default is not MISSING for one in fields(OcrConfig))
