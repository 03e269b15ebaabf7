"""What commands are given and cannot use: refused with exit code 2 and one clear line, before any work."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tiny_runs
from varl import cli, commands, policy_commands
from varl.config import PolicyConfig, RunConfig, TrainConfig
from varl.errors import InputError, RunError, checking, naming_memory
from varl.models.inkling.pretrain import PretrainConfig
from varl.plan import SAVED, estimate
from varl.recipes import check_yaml
from varl.rewards.engine import OcrConfig, _model_files
from varl.run_config import MOST_THREADS


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a file and a folder in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.png").mkdir()
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command that refuses says, in one line."""
    assert cli.main(list(words)) == 2
    captured = capsys.readouterr()
    assert not captured.out
    (line,) = captured.err.splitlines()
    return line


SEED = "must be from 0 to 9223372036854775807, got"
COUNT = "must be from 1 to 1000000, got"
BAD = {
    "generate --seed -1": f"error: seed {SEED} -1",
    "generate --seed 9999999999999999999": f"seed {SEED} 9999999999999999999",
    "generate --count 0": "count must be from 1 to 10000, got 0",
    "generate --count 9999999999": "count must be from 1 to 10000, got",
    "generate --batch -2": f"batch {COUNT} -2",
    "generate --device nothing": "there is no device 'nothing'; use auto, cpu, cuda or cuda:0",
    "generate --device meta": "there is no device 'meta'",
    "generate --device cpu:7": "there is no device 'cpu:7'",
    "generate --out folder.png": "folder.png is a folder; name a file in it",
    "generate --out file": "out must end in .png, for it is a PNG picture; got file",
    "generate --out picture.jpg": "out must end in .png",
    "generate --out none/a.png": "there is no folder",
    "generate --out file/a.png": "there is no folder",
    "generate --out /proc/a.png": "/proc/a.png cannot be written: No such file or directory",
    'generate --policy.config {"width":1,"width":2}': "line 1 gives width again",
    "generate --prompt []": "prompt is an empty list; give a text or several, or leave it out",
    "generate --out ~nobody-here/a.png": "out is ~nobody-here/a.png, but there is no user nobody-here",
    "generate --policy.weights ~nobody-here/a": "policy.weights is ~nobody-here/a, but there is no user nobody-here",
    "generate --source ~nobody-here/a.txt": "no prompt file ~nobody-here/a.txt",
    "evaluate --seed -1": f"seed {SEED} -1",
    "evaluate --prompt_seed -1": f"prompt_seed {SEED} -1",
    "evaluate --count -1": f"count {COUNT} -1",
    "evaluate --batch 0": f"batch {COUNT} 0",
    "evaluate --out none/a.json": "there is no folder",
    "evaluate --out folder.png": "folder.png is a folder; name a file in it",
    "evaluate --out /proc/a.json": "/proc/a.json cannot be written: No such file or directory",
    "probe --seed -1": f"seed {SEED} -1",
    "probe --prefixes -1": f"prefixes {COUNT} -1",
    "probe --continuations 0": f"continuations {COUNT} 0",
    "probe --prefixes 1001 --continuations 1000": "prefixes x continuations must be at most 1000000, got 1001000",
    "probe --count 1": "a probe needs at least 2 prompts, got 1",
    "probe --out file": "file is no folder, but one belongs there",
    "probe --out file/x": "file is no folder, but one belongs there",
    "probe --out /proc/x": "folder /proc/x cannot be made: No such file or directory",
    "doctor --device cuda:x": "there is no device 'cuda:x'",
    "pretrain --seed -1": f"seed {SEED} -1",
    "pretrain --device nothing": "there is no device 'nothing'",
    "pretrain --out file": "file is no folder, but one belongs there",
    "pretrain --out file/x": "file is no folder, but one belongs there",
    "pretrain --out /proc/x": "folder /proc/x cannot be made: No such file or directory",
    "pretrain --model.grids [1,2,3,6,24]": "model.fine asks for 16 components, but pictures of grids [1, 2, 3, 6, 24] "
    "have 12 numbers a patch: at most 12",
    "pretrain --model.coarse 999": "model.coarse asks for 999 components",
    "pretrain --model.codes 9": "model.codes 9 are too few for 5 grids",
    "pretrain --model.decoder 1": "model.decoder must be at least 2 channels, got 1",
    "pretrain --tokenizer.steps -1": "steps of a stage must be from 0 to 1000000000, got -1",
    "pretrain --tokenizer.batch 0": f"batch {COUNT} 0",
    "pretrain --transformer.warmup 0": "warmup of a stage must be from 1 to 1000000000, got 0",
    "pretrain --transformer.horizon 0": "horizon of a stage must be from 1 to 1000000000, got 0",
    "pretrain --transformer.learning_rate 0": "learning_rate of a stage must be positive and finite, got 0.0",
    "pretrain --drop_condition 2": "drop_condition must be a share from 0 to 1, got 2.0",
    "pretrain --last_grid_every 0": "last_grid_every must be from 1 to 1000000000, got 0",
    "pretrain --save_every -1": "save_every must be 0 or more seconds, got -1.0",
    "train --run.seed -1": f"run.seed {SEED} -1",
    "train --run.threads 1000000": f"run.threads must be from 0 to {MOST_THREADS}, got 1000000",
    "train --run.threads -1": f"run.threads must be from 0 to {MOST_THREADS}, got -1",
    "train --run.device nothing": "there is no device 'nothing'",
    "train --prompts.count 0": f"prompts.count {COUNT} 0",
    "train --prompts.seed -1": f"prompts.seed {SEED} -1",
    "train --evaluation.seed -1": f"evaluation.seed {SEED} -1",
    "train --evaluation.prompt_seed -1": f"evaluation.prompt_seed {SEED} -1",
    "train --evaluation.count 0": f"evaluation.count {COUNT} 0",
    "train --parallel.timeout 1e300": "parallel.timeout must be positive, and at most 1e+07 seconds, got 1e+300",
    "train --policy.family mini": "no model family 'mini'; there are infinity, inkling",
    "train --policy.family var --policy.config.size mini": "VAR has no size 'mini'; there are d16, d20",
    "plan --policy.family infinity --policy.config.size mini": "Infinity has no size 'mini'; there are layer12",
    "plan --policy.family switti --policy.config.size mini": "Switti has no size 'mini'; there are 512",
    "plan --policy.family tokenflow --policy.config.size mini": "TokenFlow has no size 'mini'; there is 7b",
    "plan --gpu_memory 0": "gpu_memory must be positive and finite, got 0.0",
    "dance": "there is no command 'dance'; there are train, plan",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_settings(folder: Path, capsys: pytest.CaptureFixture[str], line: str) -> None:
    before = sorted(folder.rglob("*"))
    assert BAD[line] in said(capsys, *line.split())
    assert [path for path in sorted(folder.rglob("*")) if path.name not in ("runs", "probe")] == before


@pytest.mark.parametrize("path", ["", "a\0b"])
@pytest.mark.parametrize("config", [RunConfig, PretrainConfig, commands.ProbeConfig, commands.EvaluateConfig])
def test_what_is_no_path(config: type, path: str) -> None:
    with pytest.raises(ValueError, match=r"^(run\.)?out must be a path, got '"):
        config(out=path)
    for weights in (path, {"model": path}):
        with pytest.raises(ValueError, match=r"^policy\.weights(\.model)? must be a path, got '"):
            PolicyConfig(weights=weights)


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Path]:
    """A folder of a file system that cannot be written."""
    place = tmp_path / "locked"
    place.mkdir()
    if os.geteuid():
        place.chmod(0o500)
    elif subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("root, and file systems cannot be mounted here")
    yield place
    if not os.geteuid():
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize(
    ("command", "name"), [("generate", "a.png"), ("evaluate", "a.json"), ("probe", "."), ("pretrain", ".")]
)
def test_a_read_only_place(locked: Path, capsys: pytest.CaptureFixture[str], command: str, name: str) -> None:
    line = said(capsys, command, "--out", str(locked / name))
    assert str(locked) in line
    assert "Read-only file system" in line or "Permission denied" in line


# --- What is wrong with the input, and what is a bug ---


@pytest.mark.parametrize("error", [ValueError("a"), FileNotFoundError("a"), ModuleNotFoundError("a"), RunError("a")])
def test_errors_of_the_input(error: Exception) -> None:
    with pytest.raises(InputError, match=r"^a$"), checking():
        raise error


@pytest.mark.parametrize(
    "error", [KeyError("mini"), AttributeError("a"), TypeError("a"), IndexError(7), RuntimeError()]
)
def test_bugs_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, checking():
        raise error
    assert caught.value is error


def test_a_family_that_plan_does_not_know(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(SAVED, "inkling")
    assert "the memory of inkling cannot be planned: varl plan knows var, infinity" in said(capsys, "plan")
    with pytest.raises(ValueError, match=r"varl\.plan\.SAVED"):
        estimate(TrainConfig())


# --- Memory ---

MISSING: list[Exception] = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nmore"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
    MemoryError(),
]


@pytest.mark.parametrize("error", MISSING)
def test_missing_memory_is_named_with_its_remedy(error: Exception) -> None:
    with pytest.raises(RunError, match=r"^out of memory.*; lower it$") as caught, naming_memory("lower it"):
        raise error
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"^out of memory.*; ask for less"), checking():
        raise error


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), RunError("full"), ValueError("not enough memory")])
def test_other_errors_are_none_of_memory(error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)), naming_memory("lower it"):
        raise error


def fail(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    """The words of a small training run."""
    weights = tiny_runs.tiny_weights(tmp_path / "tiny.safetensors")
    words = {
        "policy.weights": weights, "reward": "tiny_runs:score", "method.prompts": 2, "method.group": 2,
        "evaluation.enabled": "false", "run.updates": 1, "run.device": "cpu", "run.out": tmp_path / "run",
    }  # fmt: skip
    return [str(word) for name, value in words.items() for word in (f"--{name}", value)]


@pytest.mark.parametrize(("where", "remedy"), [
    ("varl.trainer.updates.draw", "lower run.rollout_batch"),
    ("varl.models.inkling.policy.Inkling.decode", "decode fewer pictures at once: lower run.micro_batch"),
    ("varl.learner.Learner.reference_logp", "lower run.micro_batch, or set policy.checkpointing"),
])  # fmt: skip
def test_a_run_without_memory_says_what_to_lower(
    small: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, where: str, remedy: str
) -> None:
    monkeypatch.setattr(where, fail)
    assert cli.main(["train", *small]) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert error.startswith("stopped: out of memory (CUDA out of memory.); ")
    assert remedy in error


@pytest.mark.parametrize("command", ["generate", "evaluate", "probe"])
def test_commands_without_memory_say_what_to_lower(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr("varl.models.inkling.policy.Inkling.decode", fail)
    monkeypatch.setattr(policy_commands, "load_reward", lambda _: tiny_runs.score)
    weights = str(tiny_runs.tiny_weights(folder / "tiny.safetensors"))
    assert cli.main([command, "--policy.weights", weights, "--count", "2", "--device", "cpu"]) == 1
    assert "out of memory (CUDA out of memory.); draw fewer pictures at once: lower --batch" in " ".join(
        capsys.readouterr().err.split()
    )


# --- Names with brackets, and with what steers terminals ---


@pytest.mark.parametrize("name", ["m[/x]", "[red]", "[/]", "a[bold]b"])
def test_names_with_brackets_are_printed_as_they_are(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    out = tmp_path / name
    assert cli.main(["train", *small, "--run.out", str(out)]) == 0
    shown = capsys.readouterr().out.replace("\n", "")
    assert f"run folder {out}" in shown
    assert f"tuned weights: {out}/weights.safetensors" in shown


def test_errors_steer_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    line = said(capsys, "generate", "--source", "a\x1b[31m[/b]\x07.txt")
    assert line == r"error: no prompt file a\x1b[31m[/b]\x07.txt"


def test_the_doctors_findings_are_printed_as_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = SimpleNamespace(fine=False, name="the reward", found="read '[/x]'")
    monkeypatch.setattr(policy_commands, "check_policy", lambda *_, **__: [])
    monkeypatch.setattr(policy_commands, "check_reader", lambda _: found)
    monkeypatch.setattr(policy_commands, "load_reward", lambda _: None)
    assert cli.main(["doctor", "--device", "cpu"]) == 1
    assert "FAIL the reward: read '[/x]'" in capsys.readouterr().out


# --- Pretraining ---


def test_pretraining_does_not_overwrite_finished_weights(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "inkling.safetensors").write_text("mine")
    line = said(capsys, "pretrain", "--out", "out")
    assert "out/inkling.safetensors is there, but no pretrain.pt to go on from" in line
    (folder / "out" / "pretrain.pt").write_text("<html>")
    assert "out/pretrain.pt cannot be read" in said(capsys, "pretrain", "--out", "out")
    torch.save({"identity": "another"}, folder / "out" / "pretrain.pt")
    assert "was made with another configuration" in said(capsys, "pretrain", "--out", "out")
    assert (folder / "out" / "inkling.safetensors").read_text() == "mine"


# --- Recipes ---


@pytest.mark.parametrize(("text", "message"), [
    ("run: {out: a}\nmethod: {}\nrun: {out: b}\n", "line 3 gives run again, which line 1 has already"),
    ("run:\n  out: a\n  updates: 3\n  out: b\n", "line 4 gives run.out again, which line 2 has already"),
    ("run: {updates: 3}\nrun.updates: 4\n", "line 2 gives run.updates again, which line 1 has already"),
    ('reward: {name: "a:b", "name": "c:d"}\n', "line 1 gives reward.name again"),
    ("policy:\n  config: {a: [{b: 1}, {b: 1, b: 2}]}\n", "line 2 gives policy.config.a.[1].b again"),
])  # fmt: skip
def test_a_key_that_is_there_twice(folder: Path, capsys: pytest.CaptureFixture[str], text: str, message: str) -> None:
    (folder / "recipe.yaml").write_text(text)
    for command in ("train", "plan", "generate"):
        assert f"recipe recipe.yaml: {message}" in said(capsys, command, "recipe.yaml")


def test_keys_that_are_alike_in_other_places() -> None:
    assert check_yaml("a: {b: 1}\nc: {b: 2}\nd: [{b: 1}, {b: 2}]\n") == {
        "a", "a.b", "c", "c.b", "d", "d.[0].b", "d.[1].b",
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "evaluate", "probe", "doctor"])
@pytest.mark.parametrize(("words", "reward"), [
    (["--reward", "a:b"], "a:b"),
    (["--reward=a:b"], "a:b"),
    (["--reward.name", "a:b"], {"name": "a:b"}),
    (["--reward.name=a:b"], {"name": "a:b"}),
    (["--reward", "a:b", "--reward.option", "3"], {"name": "a:b", "option": 3}),
    (["--reward.name", "a:b", "--reward.option", "3"], {"name": "a:b", "option": 3}),
    (["--reward", "{name: 'a:b', option: 3}"], {"name": "a:b", "option": 3}),
    (["--reward.timeout_s", "3"], {"name": "ocr", "best_of": 2, "timeout_s": 3}),
    (
        ["--reward.engine.threads", "1", "--reward.engine.det_thresh=0.4", "--reward.timeout_s", "3"],
        {"name": "ocr", "best_of": 2, "engine": {"threads": 1, "det_thresh": 0.4}, "timeout_s": 3},
    ),
    (["--reward.name", "ocr", "--reward.timeout_s", "3"], {"name": "ocr", "best_of": 2, "timeout_s": 3}),
    ([], {"name": "ocr", "best_of": 2, "timeout_s": 9}),
])  # fmt: skip
def test_options_of_the_recipes_reward_are_not_those_of_another(
    folder: Path, command: str, words: list[str], reward: Any
) -> None:
    (folder / "recipe.yaml").write_text("reward: {name: ocr, best_of: 2, timeout_s: 9}\n")
    assert cli._settings(command, cli.COMMANDS[command], ["recipe.yaml", *words]).reward == reward


HOME: dict[str, Callable[[], Any]] = {
    "run.out": lambda: RunConfig(out=Path("~/x")).out,
    "policy.weights": lambda: PolicyConfig(weights="~/x").weights,
    "policy.weights of parts": lambda: PolicyConfig(weights={"a": "~/x"}).weights["a"],  # type: ignore[index]
    "policy.adapters": lambda: PolicyConfig(adapters="~/x").adapters,
    "pretrain": lambda: PretrainConfig(out=Path("~/x")).out,
    "probe": lambda: commands.ProbeConfig(out=Path("~/x")).out,
    "evaluate": lambda: commands.EvaluateConfig(out=Path("~/x")).out,
    "generate": lambda: commands.GenerateConfig(out=Path("~/x.png")).out.with_suffix(""),
    "plan": lambda: commands.PlanConfig(run=RunConfig(out=Path("~/x"))).run.out,
}


@pytest.mark.parametrize("case", HOME)
def test_home(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.setenv("HOME", "/my/home")
    assert str(HOME[case]()) == "/my/home/x"


def test_home_of_reward_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/my/home")
    for name in ("det_model", "rec_model"):
        with pytest.raises(FileNotFoundError, match=r"no (det|rec) model: /my/home/x"):
            _model_files(OcrConfig(**{name: "~/x"}))  # type: ignore[arg-type]


def test_what_is_not_home() -> None:
    assert PolicyConfig(weights="random").weights == "random"
    assert PolicyConfig().weights is None
    assert RunConfig(out=Path("./a~b")).out == Path("a~b")
