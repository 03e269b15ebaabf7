"""What a start finds in a run folder: work that it must not overwrite, files that are damaged, other runs' checkpoints,
other held-out prompts. Each is named, and nothing is lost."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.kills import outcome

import tiny_runs
from varl import cli, commands
from varl.config import EvaluationConfig, MethodConfig, PolicyConfig, PromptConfig, RunConfig, TrainConfig
from varl.models.inkling import InklingConfig
from varl.run.metrics import read_metrics
from varl.trainer import Trainer

HELD_OUT = "the words 'KEBA' at the top\nthe words 'LUX' at the bottom\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, held-out prompts, and in ``run`` a finished run of 3 updates with checkpoints after 2 and 3."""
    folder = tmp_path_factory.mktemp("place")
    shape = InklingConfig(grids=(3, 6), codes=32, coarse=8, fine=4, decoder=8, width=16, depth=1, heads=2)
    tiny_runs.tiny_weights(folder / "tiny.safetensors", shape)
    (folder / "held-out.txt").write_text(HELD_OUT)
    Trainer(make_config(folder)).run()
    return folder


@pytest.fixture
def copy(place: Path, tmp_path: Path) -> Path:
    """A copy of that folder."""
    return Path(shutil.copytree(place, tmp_path / "copy"))


def make_config(folder: Path, updates: int = 3, **run: Any) -> TrainConfig:
    return TrainConfig(
        policy=PolicyConfig(weights=str(folder / "tiny.safetensors")),
        prompts=PromptConfig(count=3),
        reward="tiny_runs:noisy",
        method=MethodConfig(prompts=2, group=2, continuations=1, middle="grid:3"),
        evaluation=EvaluationConfig(source=str(folder / "held-out.txt"), every=1),
        run=RunConfig(**{"out": folder / "run", "updates": updates, "save_every": 1, "device": "cpu"} | run),
    )


def moved(config: TrainConfig) -> TrainConfig:
    """The configuration that the run of ``place`` has in a copy of the folder: the same but for where it lies."""
    file = config.run.out / "config.yaml"
    original = next(line for line in file.read_text().splitlines() if "weights:" in line)
    before = original.split("weights: ")[1].removesuffix("/tiny.safetensors")
    file.write_text(file.read_text().replace(before, str(config.run.out.parent)))
    return config


def files(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != "lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def without(*names: str) -> Callable[[Path], None]:
    def remove(run: Path) -> None:
        for name in ("checkpoints", *names):
            shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()

    return remove


def only(*names: str) -> Callable[[Path], None]:
    def remove(run: Path) -> None:
        without(*(path.name for path in run.iterdir() if path.name not in ("checkpoints", *names)))(run)

    return remove


def all_damaged(run: Path) -> None:
    for path in (run / "checkpoints").iterdir():
        path.rename(path.with_name(f"{path.name}.damaged"))


LEFT: dict[str, tuple[Callable[[Path], None], str]] = {
    "all but checkpoints": (without(), r"best\.safetensors, weights\.safetensors, a note of a checkpoint of update 3"),
    "no finished weights": (
        without("weights.safetensors", "best.safetensors"),
        "a note of a checkpoint of update 3, metrics of 3 updates, 4 evaluations",
    ),
    "a run of a version without notes": (without("weights.safetensors", "progress.json"), "metrics of 3 updates"),
    "a damaged note": (
        lambda run: (without()(run), (run / "progress.json").write_text("{"))[0],
        "metrics of 3 updates",
    ),
    "metrics": (only("metrics.jsonl"), "holds metrics of 3 updates, but no"),
    "metrics of a known run": (only("metrics.jsonl", "config.yaml"), "holds metrics of 3 updates, but no"),
    "evaluations": (only("evaluations"), "holds 4 evaluations, but no"),
    "best weights": (only("best.safetensors"), r"holds best\.safetensors, but no"),
    "finished weights": (only("weights.safetensors", "config.yaml"), r"holds weights\.safetensors, but no"),
    "damaged checkpoints": (all_damaged, "2 damaged checkpoints"),
}


@pytest.mark.parametrize("case", LEFT)
def test_work_without_a_checkpoint_is_refused_and_stays(copy: Path, case: str) -> None:
    config = moved(make_config(copy))
    remove, said = LEFT[case]
    remove(copy / "run")
    before = files(copy / "run")
    for _ in range(2):
        with pytest.raises(ValueError, match=said) as refused:
            Trainer(config)
        assert files(copy / "run") == before
    assert "or move the folder away to begin again" in str(refused.value)


def test_the_command_says_so_in_one_line(
    copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    moved(config := make_config(copy))
    shutil.rmtree(copy / "run" / "checkpoints")
    monkeypatch.setitem(cli.COMMANDS, "train", replace(cli.COMMANDS["train"], run=lambda _: commands.train(config)))
    assert cli.main(["train"]) == 2
    error = capsys.readouterr().err
    assert "but no checkpoint to go on from" in error
    assert "Traceback" not in error


def test_a_run_killed_before_its_first_checkpoint_begins_again(place: Path, tmp_path: Path) -> None:
    config = make_config(place, out=tmp_path / "run", save_every=9)
    config = replace(config, evaluation=replace(config.evaluation, every=0))

    def killed(record: dict[str, Any]) -> None:
        if record["update"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trainer(config).run(killed)
    assert (tmp_path / "run" / "best.safetensors").exists()
    assert len(read_metrics(tmp_path / "run")) == 2
    Trainer(config).run()
    assert [line["update"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3]


def test_without_its_newest_checkpoint_a_run_goes_on_from_the_one_before(
    copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, whole, lines = moved(make_config(copy)), outcome(copy / "run"), read_metrics(copy / "run")
    shutil.rmtree(copy / "run" / "checkpoints" / "update-000003")
    with caplog.at_level(logging.WARNING):
        trainer = Trainer(config)
    assert trainer.update == 2
    kept = copy / "run" / "later-than-update-000002"
    assert "the checkpoint of update 3 cannot be gone on from, only that of update 2" in caplog.text
    assert str(kept) in caplog.text
    assert read_metrics(kept) == lines
    assert {path.name for path in (kept / "evaluations").iterdir()} == {"update-000003.pt", "update-000003.json"}
    assert (kept / "weights.safetensors").exists()
    trainer.run()
    shutil.rmtree(kept)
    assert outcome(copy / "run") == whole


# --- Checkpoints of another run ---


def test_a_checkpoint_of_another_run_is_named_and_not_used(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = moved(make_config(copy))
    other = replace(config, run=replace(config.run, out=copy / "other", seed=1, updates=4))
    Trainer(other).run()
    shutil.copytree(copy / "other" / "checkpoints" / "update-000004", copy / "run" / "checkpoints" / "update-000004")
    shutil.copytree(copy / "run" / "checkpoints" / "update-000002", copy / "run" / "checkpoints" / "update-000009")
    with caplog.at_level(logging.WARNING):
        trainer = Trainer(config)
    trainer.folder.close()
    assert trainer.update == 3
    assert "update-000004: it is of another run: its configuration is another one" in caplog.text
    assert "update-000009: it is of update 2, and was renamed" in caplog.text
    names = {path.name for path in (copy / "run" / "checkpoints").iterdir()}
    assert {"update-000004.damaged", "update-000009.damaged", "update-000003"} <= names


def test_checkpoints_of_another_run_alone_are_refused(copy: Path) -> None:
    config = moved(make_config(copy))
    other = replace(config, run=replace(config.run, out=copy / "other", seed=1))
    Trainer(other).run()
    shutil.rmtree(copy / "run" / "checkpoints")
    shutil.copytree(copy / "other" / "checkpoints", copy / "run" / "checkpoints")
    before = files(copy / "run")
    with pytest.raises(ValueError, match=r"is of another run: its configuration is another one; .*another --run.out"):
        Trainer(config)
    assert files(copy / "run") == before


# --- Damaged files ---


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("hacked"),))


def wrong_shapes(path: Path) -> None:
    kept = torch.load(path, weights_only=True)
    torch.save(kept | {"rewards": kept["rewards"][1:]}, path)


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a cut evaluation": ("evaluations/update-000000.pt", lambda p: p.write_bytes(p.read_bytes()[:900])),
    "an empty one": ("evaluations/update-000003.pt", lambda p: p.write_bytes(b"")),
    "a page": ("evaluations/update-000003.pt", lambda p: p.write_bytes(b"<html>")),
    "code": ("evaluations/update-000000.pt", lambda p: p.write_bytes(pickle.dumps(Hostile()))),
    "other keys": ("evaluations/update-000000.pt", lambda p: torch.save({"a": torch.ones(1)}, p)),
    "no mapping": ("evaluations/update-000003.pt", lambda p: torch.save(torch.ones(1), p)),
    "a row less": ("evaluations/update-000003.pt", wrong_shapes),
    "a cut record": ("evaluations/update-000003.json", lambda p: p.write_bytes(p.read_bytes()[:300])),
    "a record of something else": ("evaluations/update-000003.json", lambda p: p.write_text("[1]")),
    "an alarm that is none": ("evaluations/update-000003.json", lambda p: p.write_text('{"alarm": 3}')),
    "a line of metrics": (
        "metrics.jsonl",
        lambda p: p.write_bytes(p.read_bytes().replace(b'{"kind', b'{"ki\xffnd', 1)),
    ),
    "micro-batches": ("micro_batches.json", lambda p: p.write_text("{")),
    "micro-batches of nothing": ("micro_batches.json", lambda p: p.write_text('{"prefix": 0, "suffix": "a"}')),
    "a note": ("progress.json", lambda p: p.write_text("")),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_file_is_named_and_kept_and_the_run_goes_on(
    copy: Path, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    config = moved(make_config(copy, 4))
    config = replace(config, evaluation=replace(config.evaluation, alarm_stops=True))
    name, damage = DAMAGE[case]
    path = copy / "run" / name
    damage(path)
    damaged = path.read_bytes()
    with caplog.at_level(logging.WARNING):
        trainer = Trainer(config)
        trainer.folder.micro_batches()
        trainer.run()
    assert str(path) in caplog.text
    assert path.with_name(f"{path.name}.damaged").read_bytes() == damaged
    lines = read_metrics(copy / "run")
    assert lines[-1]["update"] == 4
    assert len(lines) == 4 - (name == "metrics.jsonl")
    assert not Path("hacked").exists()
    trainer = Trainer(config)  # and the next start finds nothing wrong
    trainer.folder.close()


def test_metrics_that_were_cut_are_named(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = moved(make_config(copy, 4))
    path = copy / "run" / "metrics.jsonl"
    path.write_text(path.read_text().splitlines()[0] + "\n")
    with caplog.at_level(logging.WARNING):
        Trainer(config).run()
    assert f"{path} lacks 2 of the 3 updates so far, the first of them 2" in caplog.text
    assert [line["update"] for line in read_metrics(path)] == [1, 4]


@pytest.mark.parametrize("text", [b'{"half', b"[1]\n", b"\xff\xfe\n", b'{"versions": 3}\n', b"[" * 90_000])
def test_starts_that_cannot_be_read_are_named_and_stay(
    copy: Path, caplog: pytest.LogCaptureFixture, text: bytes
) -> None:
    config, path = moved(make_config(copy)), copy / "run" / "starts.jsonl"
    path.write_bytes(before := path.read_bytes() + text)
    with caplog.at_level(logging.WARNING):
        Trainer(config).folder.close()
    assert f"{path} has 1 lines that cannot be read" in caplog.text
    assert "not the versions" not in caplog.text
    assert path.read_bytes().startswith(before)
    assert json.loads(path.read_bytes().splitlines()[-1])["from_update"] == 3


BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nconfig: {run: *b}\n"


@pytest.mark.parametrize("text", [BOMB, "config: 3", "[1]", "{", "config: {run: 1, run: 2}", "[" * 50_000])
def test_a_configuration_of_anyones(copy: Path, text: str) -> None:
    config = moved(make_config(copy))
    (copy / "run" / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"config\.yaml is not as a run wrote it|holds a run with another config"):
        Trainer(config)


# --- Held-out prompts that changed ---


@pytest.mark.parametrize("now", ["the words 'TARN' at the top\n", HELD_OUT.replace("LUX", "TARN")])
def test_other_held_out_prompts_are_a_new_baseline(copy: Path, caplog: pytest.LogCaptureFixture, now: str) -> None:
    config = moved(make_config(copy, 4))
    before = files(copy / "run" / "evaluations")
    best = (copy / "run" / "best.safetensors").read_bytes()
    (copy / "held-out.txt").write_text(now)
    with caplog.at_level(logging.WARNING):
        trainer = Trainer(config)
    kept = copy / "run" / "other-held-out-prompts-000003"
    assert "the held-out prompts are others than before" in caplog.text
    assert str(kept) in caplog.text
    assert files(kept / "evaluations") == before
    assert (kept / "best.safetensors").read_bytes() == best
    assert (trainer.evaluated, trainer.best) == (None, None)
    trainer.run()
    assert trainer.folder.evaluated() == [3, 4]
    pair = trainer.folder.before_after()
    assert pair is not None
    assert [len(one.prompts) for one in pair] == [len(now.splitlines())] * 2
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        Trainer(config).folder.close()
    assert not caplog.messages


# --- What evaluations left, removed ---


def test_without_its_evaluations_a_run_has_a_new_baseline(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    config, best = moved(make_config(copy, 4)), copy / "run" / "best.safetensors"
    shutil.rmtree(copy / "run" / "evaluations")
    best.unlink()
    with caplog.at_level(logging.WARNING):
        trainer = Trainer(config)
    assert f"the evaluation after update 3 is not in {copy / 'run' / 'evaluations'}; the prompts" in caplog.text
    assert f"{best}, the best weights so far, of update" in caplog.text
    assert trainer.evaluated is None
    assert (trainer.best is None) == ("the next evaluation's take its place" in caplog.text)
    for update, nowhere in ((0, True), (3, False)):  # there is a checkpoint of update 3
        assert trainer.folder.name_removed(3, (update, 9.0)) == [True, nowhere]
    trainer.best = (3, 9.0)  # the evaluation of just these weights writes them again, though it is no better
    trainer.run()
    assert trainer.folder.evaluated() == [3, 4]
    assert best.exists()


@pytest.mark.parametrize(
    ("removed", "named", "shown"),
    [("none", "", True), ("*000003.*", "the run goes on without it", True), ("*", "as a new baseline", False)],
)
def test_removed_evaluations_are_named_and_no_picture_of_an_earlier_pair_is_shown(
    copy: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    removed: str,
    named: str,
    shown: bool,
) -> None:
    config = moved(make_config(copy))
    (copy / "run" / "before_after.png").write_bytes(b"of an earlier pair")
    for path in (copy / "run" / "evaluations").glob(removed):
        path.unlink()
    with caplog.at_level(logging.WARNING):
        commands.train(config)
    said = capsys.readouterr().out
    assert "tuned weights" in said
    assert ("before and after" in said) is shown
    assert ("the evaluation after update 3 is not in" in caplog.text) is bool(named)
    assert named in caplog.text
    assert "best.safetensors" not in caplog.text


def test_evaluations_of_other_prompts_are_never_paired(copy: Path) -> None:
    """However they came into the folder."""
    config = moved(make_config(copy))
    trainer = Trainer(config)
    path = copy / "run" / "evaluations" / "update-000000.pt"
    kept = torch.load(path, weights_only=True)
    torch.save(kept | {"prompts": [("a", ["b"], None), ("c", ["d"], 3)]}, path)
    assert trainer.folder.before_after() is None
    last = trainer.folder.result(3)
    assert last is not None
    assert [prompt.text for prompt in last.prompts] == HELD_OUT.splitlines()
    assert trainer.folder._falling(3, last, 4) == []
    trainer.folder.close()


def test_evaluations_of_the_first_version_take_their_prompts_from_the_record(copy: Path) -> None:
    config = moved(make_config(copy))
    for path in (copy / "run" / "evaluations").glob("*.pt"):
        kept = torch.load(path, weights_only=True)
        del kept["prompts"]
        torch.save(kept, path)
    trainer = Trainer(config)
    pair = trainer.folder.before_after()
    assert pair is not None
    assert [prompt.text for prompt in pair[0].prompts] == HELD_OUT.splitlines()
    assert pair[0].prompts[0].words == ("KEBA",)
    trainer.folder.close()
