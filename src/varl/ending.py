"""How processes end: those of a run together, when one fails or torchrun is killed, and each soon after its work."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

from varl.errors import Interrupted
from varl.run.signals import exit_at_once

__all__ = ["OUTLIVED_S", "end_soon", "end_with_launcher", "guarded"]

FAILED = "failed"
"""Under this key of the processes' common store stands the first to fail."""
POLL_S, GRACE_S = 1.0, 5.0
"""How often a process looks whether another has failed, and how long it then may take to end by itself."""
OUTLIVED_S = 2 * (POLL_S + GRACE_S)
"""For so long processes may go on of whom one was killed."""
LINGER_S = 30.0
"""How long the end of the program waits for what a reward left running, if that does not end by itself."""


def end_with_launcher() -> None:
    """End this process when torchrun, if that started it, is gone: it would wait for a store that nobody keeps."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_end_without, args=(os.getppid(),), daemon=True).start()


def _end_without(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_S)
    exit_at_once(1)


def end_soon(status: int, seconds: float = LINGER_S) -> None:
    """Have this process end within some seconds, with an exit status and with what still ran named: Python itself waits
    for threads, processes of ``multiprocessing`` and functions of ``atexit`` without end."""
    threading.Thread(target=_end_after, args=(seconds, status), daemon=True).start()


def _end_after(seconds: float, status: int) -> None:
    time.sleep(seconds)
    threads = [one for one in threading.enumerate() if not one.daemon and one is not threading.main_thread()]
    processes = multiprocessing.active_children()
    left = [f"thread {one.name}" for one in threads] + [f"process {one.name}" for one in processes]
    said = f"ended without waiting any longer for {', '.join(left) or 'what was registered with atexit'}\n"
    for process in processes:  # they would hold the terminal or pipe that this one writes to
        process.kill()
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    with suppress(OSError):
        os.write(2, said.encode(errors="replace"))
    exit_at_once(status)


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
