"""The recipes that come with the package, and what no recipe may hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_runs
from varl import cli
from varl.models import load_policy

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses(path: Path) -> None:
    command = "pretrain" if "pretrain" in path.stem else "train"
    config = tiny_runs.parse(command, "--config", str(path))
    if command == "train":
        with torch.device("meta"):
            policy = load_policy(config.policy.family, config.policy.config, "random")
        schedule = policy.schedules(config.policy.resolution, config.policy.aspect_ratio)
        assert 0 < schedule.middle(config.method.middle) < len(schedule)
        assert config.sampling.top_k <= policy.classes


def test_there_are_recipes() -> None:
    assert {"inkling-ocr", "inkling-pretrain"} <= {path.stem for path in RECIPES}


# --- What is refused before its values are used ---


def noted(_: Any) -> int:
    """Train."""
    return 0


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a file that would be settings of a section; nothing is trained in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(cli.COMMANDS, "train", replace(cli.COMMANDS["train"], run=noted))
    (tmp_path / "sub.yaml").write_text("family: &a inkling\nweights: *a\n")
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(list(words)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


NO_SECTION = "must be a mapping of settings, got"
REFUSED = {
    "policy: sub.yaml": f"policy {NO_SECTION} 'sub.yaml'",
    "policy: {lora: sub.yaml}": f"policy.lora {NO_SECTION} 'sub.yaml'",
    "policy.lora: sub.yaml": f"policy.lora {NO_SECTION} 'sub.yaml'",
    "evaluation: {sampling: sub.yaml}": f"evaluation.sampling {NO_SECTION} 'sub.yaml'",
    "run: 5": f"run {NO_SECTION} 5",
    "run: []": f"run {NO_SECTION} []",
    "": f"a recipe {NO_SECTION} None",
    "- run": f"a recipe {NO_SECTION} ['run']",
    "run: null": "run is null, but must have a value",
    "run: !!binary aGk=": "line 1 has 'aGk=' of YAML's kind binary",
    "run: !!set {out}": "line 1 has something of YAML's kind set",
    "run: {out: !!bool x}": "it has a value that cannot be read: KeyError('x')",
    "<<: {run: {updates: 3}}": "line 1 has '<<' of YAML's kind merge; write out what is merged",
    "prompts: {source: 2020-01-01}": "line 1 has '2020-01-01' of YAML's kind timestamp",
    "runn: {}": "there is no setting runn; there are policy, prompts, reward",
    "config: sub.yaml": "there is no setting config; there are policy",
    "method: {foo: {}}": "there is no setting method.foo; method has update, prefix_updates",
    "run.updat: 3": "there is no setting run.updat; run has out, updates",
    "run: {class_path: x}": "there is no setting run.class_path",
    "5: 6": "there is no setting 5;",
    "run: {out: ''}": "run.out is empty; name a file or folder",
}


@pytest.mark.parametrize("text", REFUSED)
def test_recipes_that_are_refused(folder: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    (folder / "recipe.yaml").write_text(text)
    line = said(capsys, "train", "recipe.yaml", "--run.out", "x")  # a word for a section hides nothing
    assert line.startswith(f"error: recipe recipe.yaml: {REFUSED[text]}")


@pytest.mark.parametrize(("words", "message"), [
    (["--policy", "sub.yaml"], f"policy {NO_SECTION} 'sub.yaml'"),
    (["--policy=sub.yaml"], f"policy {NO_SECTION} 'sub.yaml'"),
    (["--policy.lora", "sub.yaml"], f"policy.lora {NO_SECTION} 'sub.yaml'"),
    (["--evaluation.sampling", "sub.yaml"], f"evaluation.sampling {NO_SECTION} 'sub.yaml'"),
    (["--run", "{a: &a 1, b: *a}"], "--run: line 1 has an alias *a"),
    (["--run={a: &a 1, b: *a}"], "--run={a: &a 1, b: *a}: line 1 has an alias *a"),
    (["--run", "&a {out: *a}"], "--run: line 1 has an alias *a"),
    (["--config", "{runn: {}}"], "there is no setting runn"),
    (["--run.out", ""], "run.out is empty"),
    (["--run.out="], "run.out is empty"),
])  # fmt: skip
def test_words_that_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert said(capsys, "train", *words).startswith(f"error: {message}")


def test_a_section_is_not_abbreviated(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--pol", "sub.yaml"])
    assert "unrecognized arguments: --pol" in capsys.readouterr().err


def test_sections_that_are_accepted(folder: Path) -> None:
    (folder / "recipe.yaml").write_text("run.updates: 7\npolicy: {lora.rank: 2}\nevaluation: {sampling: null}\n")
    words = ["--config", "recipe.yaml", "--optimizer", "{warmup_updates: 3}", "--evaluation.sampling", "null"]
    config = tiny_runs.parse("train", *words)
    assert (config.run.updates, config.policy.lora.rank, config.optimizer.warmup_updates) == (7, 2, 3)
