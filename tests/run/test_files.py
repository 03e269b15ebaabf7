"""Files are replaced in one go or not at all, and a folder belongs to one process."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from patience import PATIENCE
from varl.errors import RunError
from varl.run import faults
from varl.run.files import FolderLock, replacing, writing


def test_a_file_is_replaced_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file.txt"
    for text in ("one", "two"):
        with replacing(path) as partial:
            assert partial.suffix == path.suffix
            partial.write_text(text)
            assert not path.exists() or path.read_text() == "one"
        assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError(28, "No space left on device")])
def test_what_fails_leaves_the_file_as_it_was(tmp_path: Path, error: Exception) -> None:
    path = tmp_path / "file.txt"
    path.write_text("before")
    expected = RunError if isinstance(error, OSError) else ValueError

    def fail() -> None:
        with replacing(path) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(expected):
        fail()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_content_is_on_the_disk_before_the_name(tmp_path: Path) -> None:
    """Or a power cut could leave the new name with no content."""
    seen = []

    def look(name: str) -> None:
        seen.append((name, (tmp_path / "partial.file").read_text(), (tmp_path / "file").exists()))

    with faults.armed(look), replacing(tmp_path / "file") as partial:
        partial.write_text("new")
    assert seen == [("file file", "new", False)]


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    match = r"metrics.jsonl cannot be written: No space left on device; what was written"
    with pytest.raises(RunError, match=match), writing(tmp_path / "metrics.jsonl"):
        full.write_text("a line\n")


def test_a_second_holder_is_refused_and_told_who_has_the_folder(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path / "run")
    with pytest.raises(ValueError, match=rf"another process trains in .*run \(process {os.getpid()} on "):
        FolderLock(tmp_path / "run")
    lock.release()
    FolderLock(tmp_path / "run").release()


def test_a_lock_whose_file_was_closed_is_released_without_error(tmp_path: Path) -> None:
    """By a reward that closes every file."""
    lock = FolderLock(tmp_path)
    os.close(lock._file.fileno())
    lock.release()
    FolderLock(tmp_path).release()


def test_the_lock_dies_with_its_process(tmp_path: Path) -> None:
    reading, writing_end = os.pipe()
    child = os.fork()
    if child == 0:
        lock = FolderLock(tmp_path)
        os.write(writing_end, b"held")
        signal.pause()
        lock.release()
    assert os.read(reading, 4) == b"held"
    with pytest.raises(ValueError, match=f"process {child} on"):
        FolderLock(tmp_path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    FolderLock(tmp_path).release()


def test_a_patient_one_waits_for_the_holder(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    began = time.monotonic()
    threading.Timer(0.5, lock.release).start()
    FolderLock(tmp_path, patience=PATIENCE).release()
    assert time.monotonic() - began >= 0.5


def test_patience_ends(tmp_path: Path) -> None:
    lock, began = FolderLock(tmp_path), time.monotonic()
    with pytest.raises(ValueError, match="another process trains in"):
        FolderLock(tmp_path, patience=0.5)
    assert time.monotonic() - began >= 0.5
    lock.release()
