"""What surrounds the updates of a run: evaluations, checkpoints, signals, and reasons to stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from varl.errors import Interrupted, RunError
from varl.run import faults
from varl.run.signals import Interrupts

if TYPE_CHECKING:
    from varl.trainer import Trainer

__all__ = ["run_updates"]


def agreed(trainer: Trainer, stop: Exception | None) -> Exception | None:
    """Whether to stop, on every process: for its own reason, or for that of the first process that has one."""
    reasons = trainer.distributed.gather_values(
        None if stop is None else [stop.signal if isinstance(stop, Interrupted) else 0, str(stop)]
    )
    reason = next((reason for reason in reasons if reason is not None), None)
    if reason is None or stop is not None:
        return stop
    signal, text = reason
    return Interrupted(signal) if signal else RunError(text)


def run_updates(trainer: Trainer, progress: Callable[[dict[str, Any]], None]) -> None:
    """See ``Trainer.run``."""
    run, evaluation, folder = trainer.config.run, trainer.config.evaluation, trainer.folder
    with folder, Interrupts() as interrupts:
        if trainer.held_out and trainer.evaluated is None:
            trainer.evaluate()
        stop = agreed(trainer, folder.hacked(evaluation.alarm_stops) or interrupts.error)
        while stop is None and trainer.update < run.updates:
            record = trainer.step()
            if trainer.distributed.main:
                folder.metrics.write(record)
                faults.point("metrics written")
                progress(record)
            stop = trainer.failures.add(record["failed_share"], record["not_finite"] / trainer.config.method.epochs)
            last = trainer.update == run.updates
            if trainer.held_out and (last or (evaluation.every and trainer.update % evaluation.every == 0)):
                trainer.evaluate()
            stop = agreed(trainer, stop or folder.hacked(evaluation.alarm_stops) or interrupts.error)
            is_best = trainer.best is not None and trainer.best[0] == trainer.update
            if last or is_best or trainer.owed or trainer.update % run.save_every == 0:
                trainer.save()
            folder.checkpoints.check()
        if stop is not None and trainer.update < run.updates:
            trainer.save()
            folder.checkpoints.wait()
            raise stop
        folder.checkpoints.wait()
        trainer.finish()
        if (failed := trainer.failures.at_end()) is not None:
            raise failed
