"""The command line as a user of a family meets it: help, recipes for every command, prompts, batches."""

from __future__ import annotations

import errno
import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import tiny_runs
from models.infinity.cases import SMALL
from small import make_inkling, make_prompts
from varl import Prompt, Sampling, cli, policy_commands
from varl.config import PolicyConfig
from varl.loading import prepare
from varl.policy import Condition, Policy
from varl.prompts import check_prompts

SAMPLING = {"guidance": 1.5, "top_k": 20, "top_p": 0.9}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A training recipe that says what it can of other commands' settings."""
    (tmp_path / "train.txt").write_text("the words 'KEBA' at the top\nthe words 'LUX' at the top\n")
    (tmp_path / "held-out.txt").write_text("the words 'TARN' at the top\n" * 3)
    content: dict[str, Any] = {
        "policy": {
            "weights": str(tiny_runs.tiny_weights(tmp_path / "tiny.safetensors")),
            "precision": "bfloat16",
            "lora": {"rank": 2},
        },
        "prompts": {"source": str(tmp_path / "train.txt")},
        "reward": {"name": "tiny_runs:score", "timeout_s": 9},
        "sampling": SAMPLING,
        "method": {"prompts": 2},
        "evaluation": {"source": str(tmp_path / "held-out.txt"), "count": 7, "prompt_seed": 5, "seed": 6},
        "run": {"device": "cpu", "micro_batch": 4, "rollout_batch": 2},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "recipe.yaml"


def settings(command: str, *words: object) -> Any:
    return cli._settings(command, cli.COMMANDS[command], [str(word) for word in words])


def failed(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert cli.main([str(word) for word in words]) == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("command", ["generate", "evaluate", "probe", "doctor"])
def test_a_recipe_of_training_serves_every_command(command: str, recipe: Path) -> None:
    found = settings(command, recipe)
    train = settings("train", recipe)
    assert found.policy == train.policy
    assert found.policy.lora.rank == 2
    held_out = command in ("generate", "evaluate")
    assert found.source == str(recipe.parent / ("held-out.txt" if held_out else "train.txt"))
    assert found.device == "cpu"
    if command != "doctor":
        assert found.sampling == Sampling(**SAMPLING)
        assert found.batch == 2
    if command != "generate":
        assert found.reward == train.reward
    if command == "evaluate":
        assert (found.count, found.prompt_seed, found.seed) == (7, 5, 6)
    else:
        plain = cli.COMMANDS[command].config()
        assert [getattr(found, n, None) for n in ("count", "seed")] == [
            getattr(plain, n, None) for n in ("count", "seed")
        ]


def test_words_override_a_recipe(recipe: Path) -> None:
    found = settings("evaluate", recipe, "--policy.lora.rank", 0, "--sampling.top_k", 5, "--source", "inkling:held-out")
    assert found.policy.lora.rank == 0
    assert found.sampling == Sampling(1.5, 5, 0.9)
    assert found.source == "inkling:held-out"
    parts = recipe.with_name("parts.yaml")
    parts.write_text("policy: {family: var, weights: {transformer: a.pth, tokenizer: b.pth}}\n")
    found = settings("evaluate", parts, "--policy.weights.transformer", "tuned.safetensors")
    assert found.policy.weights == {"transformer": "tuned.safetensors", "tokenizer": "b.pth"}


def test_recipes_without_held_out_prompts_and_with_sampling_of_their_own(recipe: Path) -> None:
    content = yaml.safe_load(recipe.read_text())
    content["evaluation"]["sampling"] = {"top_k": 1}
    recipe.write_text(yaml.safe_dump(content))
    assert settings("generate", recipe).sampling == Sampling(top_k=1)
    assert settings("probe", recipe).sampling == Sampling(**SAMPLING)
    content["evaluation"]["enabled"] = False
    recipe.write_text(yaml.safe_dump(content))
    for command in ("generate", "evaluate"):
        assert settings(command, recipe).source == str(recipe.parent / "train.txt")
        assert settings(command, recipe).sampling == Sampling(**SAMPLING)


def test_recipes_that_cannot_be_used(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no recipe none.yaml" in failed(capsys, "generate", "none.yaml")
    message = failed(capsys, "plan", recipe, "--policy.config.transformer.depth", 3)
    assert "would replace all of policy.config.transformer" in message
    recipe.write_text(recipe.read_text() + "deep: 3\n")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["generate", str(recipe)])
    assert stopped.value.code == 2
    assert "'deep'" in capsys.readouterr().err


@pytest.mark.parametrize(("given", "texts"), [("a 'KEBA' [b]", ["a 'KEBA' [b]"]), ('["a", "b"]', ["a", "b"])])
def test_a_prompt_or_several(given: str, texts: list[str]) -> None:
    found = settings("generate", "--prompt", given).prompt
    assert ([found] if isinstance(found, str) else found) == texts


def test_pictures_do_not_depend_on_the_batch(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[tuple[Sequence[Prompt], torch.Tensor]] = []
    monkeypatch.setattr(
        policy_commands, "save_pictures", lambda _, prompts, pictures: saved.append((prompts, pictures))
    )
    drawn: list[int] = []
    inner = policy_commands.rollout

    def counted(policy: Policy, condition: Condition, *rest: Any) -> Any:
        drawn.append(condition.batch)
        return inner(policy, condition, *rest)

    monkeypatch.setattr(policy_commands, "rollout", counted)
    out = recipe.parent / "sheet.png"
    for batch in (3, 2):
        assert cli.main(["generate", str(recipe), "--batch", str(batch), "--out", str(out)]) == 0
    assert drawn == [3, 2, 1]
    assert saved[0][0] == saved[1][0]
    torch.testing.assert_close(saved[0][1], saved[1][1], atol=0.05, rtol=0)
    assert not torch.equal(saved[0][1][0], saved[0][1][1])


@pytest.mark.parametrize("command", ["generate", "evaluate", "probe"])
def test_a_batch_of_nothing(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "batch must be from 1 to 1000000, got 0" in failed(capsys, command, "--batch", 0)


def test_every_prompt_is_checked_a_few_at_a_time() -> None:
    policy, rows = make_inkling(), []
    inner = policy.condition
    policy.condition = lambda prompts, schedule=None: rows.append(len(prompts)) or inner(prompts, schedule)  # type: ignore[method-assign,assignment,func-returns-value]
    check_prompts(policy, make_prompts(70), policy.default_schedule)
    assert rows == [32, 32, 6]
    with pytest.raises(ValueError, match="nothing Inkling"):
        check_prompts(policy, [*make_prompts(40), Prompt("nothing Inkling draws")], policy.default_schedule)


def test_pictures_need_a_tokenizer(tmp_path: Path) -> None:
    config = PolicyConfig("infinity", {"transformer": "random"}, json.loads(json.dumps(SMALL)))
    with pytest.raises(ValueError, match="infinity draws no pictures without its tokenizer"):
        prepare(config, torch.device("cpu"))


def full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("ended", "status", "said"),
    [
        (lambda: 3, 3, ""),
        (lambda: sys.exit("bad"), "bad", ""),
        (lambda: print("ä → b") or 0, 0, ""),
        (lambda: [][1], 1, "IndexError"),
        (full, 1, "stopped: the output cannot be written: No space left on device"),
    ],
)
def test_the_process_ends_with_the_code_of_its_command(
    ended: Callable[[], Any], status: Any, said: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Signs that the terminal's encoding lacks are spelled out."""
    out, statuses = io.BytesIO(), list[Any]()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, "latin-1"))
    monkeypatch.setattr(cli, "main", ended)
    monkeypatch.setattr(cli, "end", statuses.append)
    cli.run()
    assert statuses == [status]
    assert out.getvalue() == (b"\xe4 \\u2192 b\n" if status == 0 else b"")
    *_, last = ["", *capfd.readouterr().err.splitlines()]
    assert last[: len(said) or None] == said
