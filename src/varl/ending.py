"""How processes end: all of a run when one fails or torchrun is killed, and each without waiting for what hangs."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from varl.errors import Interrupted
from varl.run.signals import exit_at_once

__all__ = ["OUTLIVED_S", "end", "end_with_launcher", "guarded"]

FAILED = "failed"
"""Under this key of the processes' common store stands the first to fail."""
POLL_S, GRACE_S = 1.0, 5.0
"""How often a process looks whether another has failed, and how long it then may take to end by itself."""
OUTLIVED_S = 2 * (POLL_S + GRACE_S)
"""For so long processes may go on of whom one was killed."""
LEFT_S, FLUSHED_S = 5.0, 1.0
"""How long Python's own end may take, which waits for what user code has left running; and then the last output."""


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


def end(status: object) -> NoReturn:
    """End this process as ``sys.exit`` does, but within some seconds.

    Python waits for threads, child processes and functions of ``atexit``, however long they take. What still runs after
    ``LEFT_S`` is named, child processes of ``multiprocessing`` among it are killed, and the process ends.

    Args:
        status: as ``sys.exit`` takes it.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # there is none, or nobody reads it
            stream.flush()
    code = status if isinstance(status, int) else int(status is not None)
    # Both start now: Python starts no thread while it ends.
    threading.Thread(target=_end_despite_all, args=(code,), daemon=True).start()
    threading.Thread(target=_end_later, args=(code, LEFT_S + FLUSHED_S), daemon=True).start()
    sys.exit(status)  # type: ignore[arg-type]


def _end_despite_all(code: int) -> None:
    time.sleep(LEFT_S)
    left = ", ".join(_left())
    for child in multiprocessing.active_children():
        child.kill()  # or whoever reads the output of this process would wait for it
    # Not to a stream, which may be what hangs.
    os.write(2, f"still running {LEFT_S:g} s after the end, and not waited for any longer: {left}\n".encode())
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):
            stream.flush()
    exit_at_once(code)


def _end_later(code: int, seconds: float) -> None:
    time.sleep(seconds)
    exit_at_once(code)


def _left() -> list[str]:
    """What keeps this process from ending: threads and child processes, or else the function of ``atexit``."""
    main = threading.main_thread()
    left = [f"thread {t.name!a}" for t in threading.enumerate() if t is not main and not t.daemon]
    left += [f"process {child.name!a} ({child.pid})" for child in multiprocessing.active_children()]
    frame = sys._current_frames().get(main.ident or 0)
    if left or frame is None:
        return left or ["Python's own end"]
    while frame.f_back is not None:
        frame = frame.f_back
    return [f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name!a}, line {frame.f_lineno})"]
