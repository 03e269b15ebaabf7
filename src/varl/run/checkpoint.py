"""Checkpoints of a run: written beside and renamed, with a manifest of hashes; the newest whole one is gone on from.

Tensors go through ``torch.distributed.checkpoint`` in its safetensors storage, so that any number of processes can
write one and any other number read it, and plain values into the manifest as JSON: nothing in a checkpoint is executed
when it is read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

import varl
from varl.errors import RunError
from varl.models.files import sort_metadata
from varl.run import faults
from varl.run.files import beside, set_aside, sync, writing

try:
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
except ImportError as error:
    raise ImportError(
        f"checkpoints need torch 2.9 or newer, this is {torch.__version__}: pip install -U torch"
    ) from error

__all__ = ["Checkpoint", "Checkpoints", "Damaged", "Foreign", "read_manifest"]

logger = logging.getLogger(__name__)
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

FORMAT = 1
MANIFEST = "manifest.json"
NONE, NO_USE = -1, -2


class Damaged(ValueError):
    """A checkpoint is torn or was altered; the message says in what."""


class Foreign(ValueError):
    """A checkpoint is whole, but of another run; the message says how that shows."""


def read_manifest(folder: Path, *, hashes: bool = True) -> dict[str, Any]:
    """A checkpoint's manifest, after checking that the folder holds the files it names and no others.

    Args:
        hashes: also check every file's SHA-256.

    Raises:
        Damaged: if anything is not as it was written.
    """
    if strange := sorted(path.name for path in folder.glob("*") if not path.is_file()):  # a pipe would be read for ever
        raise Damaged(f"{strange[0]} is no file")
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        stated = manifest.pop("sha256")
        whole, version = stated == _digest(manifest), manifest["format"]
        files = {str(name): (int(file["bytes"]), str(file["sha256"])) for name, file in manifest["files"].items()}
        good = isinstance(manifest["values"], dict) and isinstance(manifest["update"], int) and "best" in manifest
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{MANIFEST} cannot be read ({type(error).__name__}: {error})") from error
    if not whole or not good:
        raise Damaged(f"{MANIFEST} was altered")
    if version != FORMAT:
        raise Damaged(f"it has format {version}; this version of varl reads format {FORMAT}")
    there = {path.name for path in folder.iterdir()} - {MANIFEST}
    if there != files.keys():
        differing = sorted(there ^ files.keys())
        raise Damaged(f"{differing[0]} is {'not in the manifest' if differing[0] in there else 'missing'}")
    for name, (size, sha256) in files.items():
        found = (folder / name).stat().st_size
        if found != size:
            raise Damaged(f"{name} has {found} bytes, not {size}")
        if hashes and _hash(folder / name) != sha256:
            raise Damaged(f"{name} was altered: its SHA-256 is not that of the manifest")
    return manifest


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint.

    Attributes:
        path: its folder.
        update: the updates made so far.
        values: the plain values that were saved.
    """

    path: Path
    update: int
    values: dict[str, Any]
    group: dist.ProcessGroup | None = None

    def names(self) -> list[str]:
        """The names of its tensors."""
        return sorted(self._stored())

    def empty(self, group: str) -> dict[str, Tensor]:
        """New tensors to fill, of the shapes and types that are stored, for all names that begin with ``group.``."""
        return {
            name: torch.empty(stored.size, dtype=stored.properties.dtype)
            for name, stored in self._stored().items()
            if name.startswith(f"{group}.")
        }

    def _stored(self) -> dict[str, TensorStorageMetadata]:
        metadata = HuggingFaceStorageReader(str(self.path)).read_metadata()
        return cast(dict[str, TensorStorageMetadata], metadata.state_dict_metadata)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Fill tensors in place (sharded ones too), by name. Collective where there are several processes.

        Raises:
            ValueError: if one is not in the checkpoint, or has another shape.
        """
        missing = sorted(tensors.keys() - set(self.names()))
        if missing:
            raise ValueError(f"checkpoint {self.path} lacks {len(missing)} tensors of this run, such as {missing[0]}")
        reader = HuggingFaceStorageReader(str(self.path))
        try:
            dcp.load(tensors, storage_reader=reader, process_group=self.group, no_dist=not dist.is_initialized())
        except CheckpointException as error:  # no Exception, but a BaseException
            raise ValueError(f"checkpoint {self.path} does not fit this run: {_reason(error)}") from error


class Checkpoints:
    """The folder of a run's checkpoints, ``update-000040`` after 40 updates; kept are the newest and the best.

    ``save`` copies the tensors and returns; a thread writes them. At most one is being written at a time.

    With several processes every method is collective, and the folder must be on a file system that all see.

    Args:
        folder: made when the first one is saved.
        keep: how many of the newest to keep.
        finished: called with the update of every checkpoint that is whole on the disk, by the process that wrote it.
    """

    def __init__(self, folder: Path, keep: int, finished: Callable[[int], None] = lambda update: None) -> None:
        self.folder, self.keep, self.finished = folder, keep, finished
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        # The thread's own group: its collectives must not meet those of the training.
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._stager = DefaultStager(StagingOptions(False, False, False, False))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._newest: int | None = None

    def paths(self) -> list[Path]:
        """All checkpoints, oldest first, whole or not."""
        found = (path for path in self.folder.glob("update-*") if path.name.removeprefix("update-").isdecimal())
        return sorted(found, key=_update_of)

    def save(self, update: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any], best: int | None) -> None:
        """Write a checkpoint in the background and remove those beyond ``keep``, other than the best.

        Does nothing if that of this update is there.

        Args:
            tensors: by name; each process gives those it holds or shares in.
            values: what JSON holds; those of the first process are kept.
            best: the update of the best one, which stays.

        Raises:
            RunError: if an earlier one could not be written.
        """
        self.wait()
        if update == self._newest:
            return
        faults.point("checkpoint begins")
        # By name: which process writes what they share follows the order, and a run that was gone on with has another.
        # The format requires contiguous tensors, and some families decode to transposed views.
        whole = {name: value.contiguous() for name, value in sorted(tensors.items())}
        staged = cast(dict[str, Tensor], self._stager.stage(whole))
        faults.point("checkpoint staged")
        self._pending = self._thread.submit(self._write, update, staged, dict(values), best)
        self._newest = update

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            RunError: if it could not be written; the checkpoints before it are whole.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def check(self) -> None:
        """Raise the error of a write that has failed; does not wait."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def close(self) -> None:
        """Until nothing is being written; a failure is logged, not raised."""
        if self._pending is not None and (error := self._pending.exception()) is not None:
            logger.error("%s", error)
        self._pending = None

    def latest(self, foreign: Callable[[dict[str, Any]], str] = lambda values: "") -> Checkpoint | None:
        """The newest whole checkpoint of this run, or None if there is none. Newer ones that are damaged, or of another
        run, are named in the log and set aside as ``update-000040.damaged``.

        Args:
            foreign: why a checkpoint with such values is of another run; empty if it is of this one.

        Raises:
            RunError: if there are checkpoints but none is whole.
            Foreign: if there are whole ones, but all of another run.
        """
        found, wrong = NONE, list[str]()
        error: RunError | Foreign = RunError(f"none of the checkpoints in {self.folder} can be used: see process 0")
        if self.rank == 0:
            for path in reversed(self.paths()):
                try:
                    found = _usable(path, foreign)
                    break
                except (Damaged, Foreign) as reason:
                    wrong.append(f"checkpoint {path}: {reason}")
                    logger.warning("%s; trying the one before", wrong[-1])
                    how = "put one back, or move the folder away to begin again"
                    if isinstance(reason, Foreign):
                        error = Foreign(f"{wrong[-1]}; give what it was made with, or choose another --run.out")
                    elif isinstance(error, RunError):
                        error = RunError(
                            f"none of the checkpoints in {self.folder} is whole ({'; '.join(wrong)}); {how}"
                        )
            else:
                found = NO_USE if wrong else NONE
        found = self._agreed(found)
        if found == NO_USE:
            raise error
        if found == NONE:
            return None
        self._newest = found
        path = self._path(found)
        manifest = read_manifest(path, hashes=False)
        if self.rank == 0:
            for newer in self.paths():
                if _update_of(newer) > found:
                    set_aside(newer)
            self._prune(manifest["best"])
        return Checkpoint(path, found, manifest["values"], self._group)

    def _path(self, update: int) -> Path:
        return self.folder / f"update-{update:06d}"

    def _write(self, update: int, tensors: dict[str, Tensor], values: dict[str, Any], best: int | None) -> None:
        path = self._path(update)
        partial = beside(path)

        def begin() -> None:
            _remove(partial)
            partial.mkdir(parents=True)

        def store() -> None:
            writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
            dcp.save(tensors, storage_writer=writer, process_group=self._group, no_dist=not dist.is_initialized())

        stages = {
            "folder made": (begin, False),
            "tensors written": (store, True),
            "finished": (lambda: self._finish(path, partial, update, values, best), False),
        }
        for name, (stage, everywhere) in stages.items():
            error: RunError | None = None
            try:
                if everywhere or self.rank == 0:
                    with writing(path):
                        stage()
            except RunError as failure:
                error = failure
            except CheckpointException as failure:  # no Exception, but a BaseException
                error = RunError(f"{path} cannot be written: {_reason(failure)}; the checkpoints before it are whole")
            if self._worst(error is not None):
                if self.rank == 0:
                    shutil.rmtree(partial, ignore_errors=True)
                raise error or RunError(f"{path} cannot be written; another process says why")
            faults.point(f"checkpoint {name}")

    def _finish(self, path: Path, partial: Path, update: int, values: dict[str, Any], best: int | None) -> None:
        for shard in partial.glob("*.safetensors"):
            sort_metadata(shard)
            sync(shard)
        files = {p.name: {"bytes": p.stat().st_size, "sha256": _hash(p)} for p in sorted(partial.iterdir())}
        manifest = {"format": FORMAT, "varl": varl.__version__, "torch": str(torch.__version__), "update": update}
        manifest |= {"best": best, "values": values, "files": files}
        (partial / MANIFEST).write_text(json.dumps({"sha256": _digest(manifest), **manifest}, indent=1))
        sync(partial / MANIFEST)
        sync(partial)
        faults.point("checkpoint manifest written")
        _remove(path)  # a damaged one that was not newer than what the run went on from
        os.replace(partial, path)
        sync(self.folder)
        faults.point("checkpoint renamed")
        self.finished(update)
        self._prune(best)

    def _prune(self, best: int | None) -> None:
        """Remove old checkpoints, and what was being written or removed when a process was killed."""
        for old in self.paths()[: -self.keep]:
            if best is None or old != self._path(best):
                _remove(old)
        for left in self.folder.glob("partial.*"):
            _remove(left)

    def _agreed(self, number: int) -> int:
        """The first process's number, on every one."""
        shared = torch.tensor(number)
        if self._group is not None:
            dist.broadcast(shared, 0, group=self._group)
        return int(shared)

    def _worst(self, failed: bool) -> bool:
        """Whether it failed on any process."""
        shared = torch.tensor(int(failed))
        if self._group is not None:
            dist.all_reduce(shared, dist.ReduceOp.MAX, group=self._group)
        return bool(shared)


def _usable(path: Path, foreign: Callable[[dict[str, Any]], str]) -> int:
    """The update of a checkpoint that is whole and of this run.

    Raises:
        Damaged, Foreign: if it is not.
    """
    manifest = read_manifest(path)
    if manifest["update"] != _update_of(path):
        raise Damaged(f"it is of update {manifest['update']}, and was renamed")
    if reason := foreign(manifest["values"]):
        raise Foreign(f"it is of another run: {reason}")
    return manifest["update"]


def _update_of(path: Path) -> int:
    return int(path.name.removeprefix("update-"))


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove(folder: Path) -> None:
    """Remove a folder if it is there; killed in between, what is left does not look like a checkpoint.

    A file in its place is removed too, and a link, but not what it leads to.
    """
    if not os.path.lexists(folder):
        return
    doomed = folder if folder.name.startswith("partial.") else beside(folder)
    if doomed != folder:
        _remove(doomed)
        folder.rename(doomed)
    if doomed.is_dir() and not doomed.is_symlink():
        shutil.rmtree(doomed)
    else:
        doomed.unlink()


def _reason(error: CheckpointException) -> str:
    first: Sequence[Any] = next(iter(error.failures.values()), ("unknown",))
    return str(first[0])
