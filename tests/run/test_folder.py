"""What can go wrong around a run's folder: full, read-only, taken, altered, or written by other versions."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.kills import outcome

import tiny_runs
import varl
from varl import cli
from varl.config import EvaluationConfig, MethodConfig, PolicyConfig, PromptConfig, RunConfig, TrainConfig
from varl.errors import RunError
from varl.models import load_policy
from varl.models.inkling import InklingConfig, save
from varl.run import faults
from varl.trainer import Trainer


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = InklingConfig(grids=(3, 6), codes=32, coarse=8, fine=4, decoder=8, width=16, depth=1, heads=2)
    return tiny_runs.tiny_weights(tmp_path_factory.mktemp("weights") / "tiny.safetensors", shape)


def make_config(weights: Path, out: Path, **run: Any) -> TrainConfig:
    return TrainConfig(
        policy=PolicyConfig(weights=str(weights)),
        prompts=PromptConfig(count=3),
        reward="tiny_runs:noisy",
        method=MethodConfig(prompts=2, group=2, continuations=1, middle="grid:3"),
        evaluation=EvaluationConfig(count=2, every=2),
        run=RunConfig(**{"out": out, "updates": 3, "save_every": 2, "device": "cpu", "gallery_every": 2} | run),
    )


@pytest.fixture(scope="module")
def whole(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("whole")
    Trainer(make_config(weights, out)).run()
    return outcome(out)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_stops_the_run_which_goes_on_when_there_is_room(
    weights: Path, whole: dict[str, Any], small_disk: Path
) -> None:
    filler, config = small_disk / "filler", make_config(weights, small_disk / "run")
    said = []
    # Room grows by and by, so that the disk is full at another moment every time.
    for size in range(100, 1500, 100):
        subprocess.run(["mount", "-o", f"remount,size={size}k", str(small_disk)], check=True)
        filler.unlink(missing_ok=True)
        try:
            Trainer(config).run()
            break
        except RunError as error:
            said.append(str(error))
    assert len(said) >= 3
    assert all("No space left on device" in reason for reason in said), said
    assert outcome(small_disk / "run") == whole


@pytest.mark.slow
def test_every_file_that_cannot_be_written_stops_the_run_and_loses_nothing(
    weights: Path, whole: dict[str, Any], tmp_path: Path
) -> None:
    points: dict[str, None] = {}
    with faults.armed(lambda name: points.setdefault(name)):
        Trainer(make_config(weights, tmp_path / "points")).run()
    writes = [name for name in points if name.startswith("file ")] + ["checkpoint manifest written"]
    assert {"file config.yaml", "file weights.safetensors", "file update-000002.png"} <= set(writes)

    def fail(name: str, now: str) -> None:
        if now == name:
            raise OSError(28, "No space left on device")

    for number, name in enumerate(writes):
        config = make_config(weights, tmp_path / str(number))
        with faults.armed(lambda now, name=name: fail(name, now)), pytest.raises(RunError, match="No space left"):
            Trainer(config).run()
        assert not any((tmp_path / str(number)).glob("partial.*"))
        Trainer(config).run()
        assert outcome(tmp_path / str(number)) == whole, name


def train(capsys: pytest.CaptureFixture[str], recipe: Path, *words: str) -> tuple[int, str]:
    code = cli.main(["train", str(recipe), *words])
    return code, capsys.readouterr().err


def write_recipe(weights: Path, tmp_path: Path, more: str = "") -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"""
policy: {{weights: {weights}}}
reward: tiny_runs:noisy
method: {{prompts: 2, group: 2, middle: "grid:3"}}
evaluation: {{enabled: false}}
run: {{out: {tmp_path / "run"}, updates: 2, device: cpu, gallery_every: 0}}
{more or "prompts: {count: 3}"}
""")
    return path


def test_a_read_only_folder_is_refused_before_work(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "locked").mkdir()
    if os.geteuid() == 0:  # permissions do not bind root
        mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(tmp_path / "locked")]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("root, and file systems cannot be mounted here")
    else:
        (tmp_path / "locked").chmod(0o500)
    try:
        code, said = train(capsys, write_recipe(weights, tmp_path), "--run.out", str(tmp_path / "locked" / "run"))
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", str(tmp_path / "locked")], check=True)
    assert code == 2
    assert "Traceback" not in said
    assert "locked/run" in said
    assert "Read-only file system" in said or "Permission denied" in said


def test_a_file_where_the_folder_should_be(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").write_text("mine")
    code, said = train(capsys, write_recipe(weights, tmp_path), "--run.out", str(tmp_path / "taken"))
    assert (code, (tmp_path / "taken").read_text()) == (2, "mine")
    assert "taken/lock cannot be written" in said


def test_two_runs_in_one_folder(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(weights, tmp_path)
    first = Trainer(tiny_runs.parse("train", "--config", str(recipe)))
    code, said = train(capsys, recipe)
    assert code == 2
    assert f"another process trains in {tmp_path / 'run'} (process {os.getpid()} on" in said
    first.run()
    assert train(capsys, recipe)[0] == 0


def test_a_refused_run_lets_go_of_its_folder(weights: Path, tmp_path: Path) -> None:
    config = make_config(weights, tmp_path / "run")
    Trainer(config).run()
    (tmp_path / "run" / "config.yaml").write_text("config: [")
    with pytest.raises(ValueError, match=r"config.yaml is not as a run wrote it"):
        Trainer(config)
    (tmp_path / "run" / "config.yaml").unlink()
    Trainer(config).run()


def test_a_prompt_file_that_vanishes_or_changes(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    lines = ["the words 'KEBA' at the top\n", "the words 'LUX' at the bottom\n"]
    prompts.write_text("".join(lines))
    recipe = write_recipe(weights, tmp_path, f"prompts: {{source: {prompts}}}")
    trainer = Trainer(tiny_runs.parse("train", "--config", str(recipe)))
    prompts.unlink()
    trainer.run()  # they were read before work started
    code, said = train(capsys, recipe, "--run.updates", "3")
    assert code == 2
    assert f"no prompt file {prompts}" in said
    prompts.write_text("".join(reversed(lines)))
    code, said = train(capsys, recipe, "--run.updates", "3")
    assert code == 2
    assert "the stream to resume had digest of the prompts" in said
    prompts.write_text("".join(lines))
    assert train(capsys, recipe, "--run.updates", "3")[0] == 0


def test_other_weights_are_refused(weights: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copy(weights, tmp_path / "mine.safetensors"))
    config = make_config(mine, tmp_path / "run")
    Trainer(config).run()
    policy = load_policy("inkling", weights=mine)
    with torch.no_grad():
        policy.trainable.get_parameter("head.bias").add_(1)
    save(policy, mine)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"began from other weights than policy\.weights now holds"):
        Trainer(replace(config, run=replace(config.run, updates=5)))


def test_a_start_notes_what_it_was_made_with(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(weights, tmp_path)
    Trainer(config).run()
    monkeypatch.setattr(varl, "__version__", "99.0")
    with caplog.at_level(logging.WARNING):
        Trainer(replace(config, run=replace(config.run, updates=4))).run()
    first, second = (json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines())
    assert (first["from_update"], second["from_update"]) == (0, 3)
    assert {"varl", "python", "torch", "numpy", "rapidocr", "onnxruntime"} <= first["versions"].keys()
    assert first["hardware"]["cores"] == os.cpu_count()
    assert first["hardware"]["cpu"]
    assert f"varl was {first['versions']['varl']}, is 99.0" in caplog.text
