"""Writing files so that a crash or a full disk leaves the earlier ones whole, and one process a folder."""

from __future__ import annotations

import fcntl
import os
import socket
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from safetensors import SafetensorError

from varl.errors import RunError
from varl.run import faults

__all__ = [
    "FolderLock",
    "beside",
    "check_writable",
    "free_name",
    "need_file",
    "need_folder",
    "replacing",
    "set_aside",
    "sync",
    "writing",
]

RESUMED = "what was written before is whole; put that right, and the same command goes on from the last checkpoint"


def beside(path: Path) -> Path:
    """Where what will be ``path`` is written first; its ending is kept, since formats go by it."""
    return path.with_name(f"partial.{path.name}")


def free_name(path: Path) -> Path:
    """``path``, or with a number behind it if that is taken."""
    names = (path if number == 1 else path.with_name(f"{path.name}-{number}") for number in count(1))
    return next(name for name in names if not name.exists())


def set_aside(path: Path) -> Path:
    """Rename what cannot be used to ``path.damaged`` (``path.damaged-2``, ...), so that nothing is lost.

    Returns:
        Its new path.

    Raises:
        RunError: if the folder cannot be written.
    """
    kept = free_name(path.with_name(f"{path.name}.damaged"))
    with writing(kept):
        path.rename(kept)
    return kept


def sync(path: Path) -> None:
    """Have a file's or folder's content on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def need_file(path: Path) -> None:
    """Refuse what is there in place of a file, before it is read or replaced: a pipe or a device may have no end.

    Raises:
        ValueError: naming it, and what it is.
    """
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "a pipe, a socket or a device"
        raise ValueError(f"{path} is {what}, where a file belongs; move it away")


def need_folder(path: Path) -> None:
    """Refuse what is there in place of a folder, or of one above it.

    Raises:
        ValueError: naming it.
    """
    there = next((place for place in (path, *path.parents) if os.path.lexists(place)), None)
    if there is not None and not there.is_dir():
        raise ValueError(f"{there} is no folder, but one belongs there; move it away")


def check_writable(path: Path) -> None:
    """Refuse a file that could not be written, before the work whose result it is to hold.

    Raises:
        ValueError: if it is a folder, or cannot be opened or made; the message names it and the reason.
        FileNotFoundError: if there is no folder for it.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file in it")
    folder = path.resolve().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder} to write {path.name} into")
    new = not path.exists()
    try:
        # Not to wait for somebody who reads, if it is a pipe.
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK | (os.O_CREAT | os.O_EXCL if new else os.O_APPEND), 0o666))
        if new:
            path.unlink()
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror or error}") from error


@contextmanager
def writing(path: Path, remedy: str = RESUMED) -> Iterator[None]:
    """Around what writes a file.

    Args:
        remedy: what follows for the reader of an error.

    Raises:
        RunError: if it cannot be written (disk full, no permission, ...), naming the file and the reason.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        at = (error.filename2 or error.filename) if isinstance(error, OSError) else None
        reason += f" ({at})" if at is not None and str(at) != str(path) else ""
        raise RunError(f"{path} cannot be written: {reason}; {remedy}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to; at the end its content is on the disk and takes the place of ``path`` in one go.

    Raises:
        RunError: as ``writing``; ``path`` is then as it was.
    """
    partial = beside(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            faults.point(f"file {path.name}")
            sync(partial)
            os.replace(partial, path)
        except Exception:
            with suppress(OSError):
                partial.unlink()
            raise
        sync(path.parent)


_locks: weakref.WeakSet[FolderLock] = weakref.WeakSet()


def _let_go_in_child() -> None:
    """A child made by fork, such as a worker of a reward's pool, may outlive a run that is killed."""
    for lock in _locks:
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)


class FolderLock:
    """Holds a folder for one process; the kernel lets go of it when the process dies, however it dies.

    Args:
        patience: seconds to wait for another process that holds it.

    Raises:
        ValueError: if another process holds it still, or it is no folder.
        RunError: if the folder cannot be written.
    """

    def __init__(self, folder: Path, patience: float = 0.0) -> None:
        path = folder / "lock"
        try:
            need_folder(folder)
            need_file(path)
        except ValueError as error:
            raise ValueError(f"{path} cannot be written: {error}, or choose another --run.out") from error
        with writing(path, "put that right, or choose another --run.out"):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+")
            if not self._held(patience):
                self._file.seek(0)
                holder = self._file.read().strip() or "unknown"
                self._file.close()
                raise ValueError(
                    f"another process trains in {folder} ({holder}); wait for it, stop it, or choose another --run.out"
                )
            # Never removed: who waits on a removed file would hold a lock that nobody else sees.
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            self._file.flush()
        _locks.add(self)

    def _held(self, patience: float) -> bool:
        last = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() >= last:
                    return False
                time.sleep(0.1)

    def release(self) -> None:
        with suppress(OSError):  # closed by a reward that closed every file: the kernel has let go then
            self._file.close()
