"""How the processes of a run end together: when one fails, or torchrun is killed, all do."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from varl.errors import Interrupted
from varl.run.signals import exit_at_once

__all__ = ["OUTLIVED_S", "end_with_launcher", "guarded"]

FAILED = "failed"
"""Under this key of the processes' common store stands the first to fail."""
POLL_S, GRACE_S = 1.0, 5.0
"""How often a process looks whether another has failed, and how long it then may take to end by itself."""
OUTLIVED_S = 2 * (POLL_S + GRACE_S)
"""For so long processes may go on of whom one was killed."""


def end_with_launcher() -> None:
    """End this process when torchrun, if that started it, is gone: it would wait for a store that nobody keeps."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_end_without, args=(os.getppid(),), daemon=True).start()


def _end_without(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_S)
    exit_at_once(1)


@contextmanager
def guarded(store: dist.Store | None, rank: int, size: int) -> Iterator[None]:
    """Around a run: when a process fails, all end. The first one to fail says why, the others are silent.

    Args:
        store: common to the processes; None if there is one alone.
    """
    done = threading.Event()
    if store is not None:
        threading.Thread(target=_watch, args=(store, done), daemon=True).start()
    try:
        yield
        if size > 1:
            dist.barrier()
    except BaseException as error:
        if store is not None and _was_not_first(store, rank):
            raise SystemExit(128 + error.signal if isinstance(error, Interrupted) else 1) from None
        if size > 1:
            error.add_note(f"process {rank} of {size} was the first to fail, or to lose another")
        raise
    finally:
        done.set()
    if dist.is_initialized():
        dist.destroy_process_group()


def _was_not_first(store: dist.Store, rank: int) -> bool:
    """Whether another process failed before this one does."""
    try:
        return store.compare_set(FAILED, "", str(rank)) != str(rank).encode()
    except RuntimeError:  # the process that kept the store is gone, so it was first
        return True


def _watch(store: dist.Store, done: threading.Event) -> None:
    """End this process where another has failed and this one waits for it."""
    while not done.wait(POLL_S):
        try:
            failed = store.check([FAILED])
        except RuntimeError:  # whoever kept the store is gone
            failed = True
        if failed and not done.wait(GRACE_S):
            exit_at_once(1)
