"""What surrounds the updates of a run: evaluations, checkpoints, signals, and reasons to stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from varl.run import faults
from varl.run.signals import Interrupts

if TYPE_CHECKING:
    from varl.trainer import Trainer

__all__ = ["run_updates"]


def run_updates(trainer: Trainer, progress: Callable[[dict[str, Any]], None]) -> None:
    """See ``Trainer.run``."""
    run, evaluation, folder = trainer.config.run, trainer.config.evaluation, trainer.folder
    with folder, Interrupts() as interrupts:
        if trainer.held_out and trainer.evaluated is None:
            trainer.evaluate()
        stop: Exception | None = folder.hacked(evaluation.alarm_stops) or interrupts.error
        while stop is None and trainer.update < run.updates:
            record = trainer.step()
            folder.metrics.write(record)
            faults.point("metrics written")
            progress(record)
            stop = trainer.failures.add(record["failed_share"], record["skipped"] / trainer.config.method.epochs)
            last = trainer.update == run.updates
            if trainer.held_out and (last or (evaluation.every and trainer.update % evaluation.every == 0)):
                trainer.evaluate()
            stop = stop or folder.hacked(evaluation.alarm_stops) or interrupts.error
            is_best = trainer.best is not None and trainer.best[0] == trainer.update
            if last or is_best or trainer.update % run.save_every == 0:
                trainer.save()
            folder.checkpoints.check()
        if stop is not None and trainer.update < run.updates:
            trainer.save()
            folder.checkpoints.wait()
            raise stop
        folder.checkpoints.wait()
        trainer.finish()
