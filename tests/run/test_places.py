"""What lies in a run folder where a run's own files and folders belong, and is none: refused at the start, by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from varl.config import EvaluationConfig, RunConfig, TrainConfig
from varl.errors import RunError
from varl.models.inkling.pretrain import PretrainConfig, check_folder
from varl.run.files import check_writable, writing
from varl.run.folder import RunFolder


def as_folder(path: Path) -> None:
    path.mkdir()


def as_file(path: Path) -> None:
    path.write_text("mine")


def as_device(path: Path) -> None:
    path.symlink_to("/dev/full")


def to_nothing(path: Path) -> None:
    path.symlink_to("nothing")


def start(folder: Path) -> None:
    RunFolder(TrainConfig(evaluation=EvaluationConfig(enabled=False), run=RunConfig(out=folder))).close()


PIPE, FOLDER = "is a pipe, a socket or a device, where a file", "is a folder, where a file"
NONE = "is no folder, but one"
PLACES: list[tuple[str, Callable[[Path], None], str]] = [
    ("lock", as_folder, FOLDER),
    ("lock", os.mkfifo, PIPE),
    ("config.yaml", as_folder, FOLDER),
    ("config.yaml", os.mkfifo, PIPE),
    ("partial.config.yaml", as_folder, FOLDER),
    ("metrics.jsonl", as_folder, FOLDER),
    ("metrics.jsonl", os.mkfifo, PIPE),
    ("metrics.jsonl", as_device, PIPE),
    ("starts.jsonl", as_folder, FOLDER),
    ("starts.jsonl", os.mkfifo, PIPE),
    ("progress.json", os.mkfifo, PIPE),
    ("partial.progress.json", as_folder, FOLDER),
    ("micro_batches.json", os.mkfifo, PIPE),
    ("best.safetensors", as_folder, FOLDER),
    ("weights.safetensors", as_folder, FOLDER),
    ("partial.weights.safetensors", as_folder, FOLDER),
    ("adapters.safetensors", as_folder, FOLDER),
    ("before_after.png", as_folder, FOLDER),
    ("evaluations", as_file, NONE),
    ("evaluations", to_nothing, NONE),
    ("evaluations/update-000000.pt", os.mkfifo, PIPE),
    ("evaluations/update-000000.json", as_folder, FOLDER),
    ("evaluations/partial.update-000004.pt", as_folder, FOLDER),
    ("gallery", as_file, NONE),
    ("gallery/update-000001.png", as_folder, FOLDER),
    ("checkpoints", as_file, NONE),
]


@pytest.mark.parametrize(("name", "make", "said"), PLACES)
def test_what_is_no_file_or_folder_is_refused_at_the_start(
    tmp_path: Path, name: str, make: Callable[[Path], None], said: str
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    make(path)
    with pytest.raises(ValueError, match=rf"{path} {said} belongs.*; move it away, or choose another --run.out"):
        start(tmp_path)
    assert os.path.lexists(path)
    path.rename(tmp_path.parent / f"{tmp_path.name}.away")
    start(tmp_path)


@pytest.mark.parametrize(
    ("name", "make", "said"), [("pretrain.pt", os.mkfifo, PIPE), ("pretrain.partial", as_folder, FOLDER)]
)
def test_the_checkpoint_of_pretraining(tmp_path: Path, name: str, make: Callable[[Path], None], said: str) -> None:
    make(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name} {said} belongs"):
        check_folder(PretrainConfig(out=tmp_path))


@pytest.mark.parametrize("name", ["taken", "taken/inside", "/dev/null", "link"])
def test_a_run_folder_that_is_no_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "taken").write_text("mine")
    (tmp_path / "link").symlink_to("nothing")
    there = tmp_path / name.removesuffix("/inside")
    with pytest.raises(ValueError, match=rf"{there} {NONE} belongs there; .*another --run.out") as refused:
        start(tmp_path / name)
    assert "room" not in str(refused.value)


CONFIGURATIONS = {
    "": "it has no configuration under 'config'",
    "config:": "it has no configuration under 'config'",
    "config: [run]": "it has no configuration under 'config'",
    "varl: 1": "it has no configuration under 'config'",
    "config: {[1]: 2}": "unhashable key",
    "config: !!python/name:os.system": "of YAML's kind os.system;",
    "config: 2001-99-99": "of YAML's kind timestamp;",
    "config: !!bool x": "KeyError('x')",
}


@pytest.mark.parametrize("text", CONFIGURATIONS)
def test_a_configuration_that_no_run_wrote(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match="is not as a run wrote it") as refused:
        start(tmp_path)
    assert CONFIGURATIONS[text] in str(refused.value)
    assert "NoneType" not in str(refused.value)


def test_a_pipe_that_nobody_reads_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "out.json")
    with pytest.raises(ValueError, match=r"out\.json cannot be written: No such device"):
        check_writable(tmp_path / "out.json")


def test_what_cannot_be_written_is_named_with_what_stands_in_its_way(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    match = rf"a\.json cannot be written: Not a directory \({tmp_path}/taken/x\); what"
    with pytest.raises(RunError, match=match), writing(tmp_path / "a.json"):
        (tmp_path / "taken" / "x").read_bytes()
