"""When failing rewards and skipped steps are too many for a run to go on."""

from __future__ import annotations

from collections import deque
from statistics import fmean

from varl.errors import RunError

__all__ = ["FailureWindow"]


class FailureWindow:
    """The failed shares of the last updates, against the share that is allowed.

    Args:
        window: how many updates it looks at.
        allowed: the mean failed share over a whole window that is still allowed, in [0, 1]. The window need not be
            full: with 20 and 0.5, the 11th update in a row that fails entirely is one too many.

    Attributes:
        shares: of the last updates, oldest first, each (pictures, steps).
    """

    def __init__(self, window: int, allowed: float) -> None:
        self.window, self.allowed = window, allowed
        self.shares: deque[tuple[float, float]] = deque(maxlen=window)

    def add(self, pictures: float, steps: float) -> RunError | None:
        """Count an update.

        Args:
            pictures: share of its pictures that could not be scored.
            steps: share of its optimizer steps that were not taken, for a loss or gradient that is not finite.

        Returns:
            The error to stop with, if there were too many. The window is then empty, so that the run can go on once
            the cause is mended.
        """
        self.shares.append((pictures, steps))
        if self._failed() <= self.allowed * self.window:
            return None
        error = RunError(
            f"in the last {len(self.shares)} updates {self._what()}; run.max_failed_share allows {self.allowed:.0%} of "
            f"{self.window} updates. {self._cause()}; the same command goes on from here"
        )
        self.shares.clear()
        return error

    def at_end(self) -> RunError | None:
        """The error to end with, if of the last updates, however few, more failed than is allowed.

        Without it a run shorter than the window would end as if all were well.
        """
        if not self.shares or self._failed() <= self.allowed * len(self.shares):
            return None
        return RunError(
            f"the run has reached its last update, but in the last {len(self.shares)} updates {self._what()}, more than "
            f"run.max_failed_share allows ({self.allowed:.0%}). {self._cause()}; the weights are written, and are "
            "those of the updates that succeeded"
        )

    def _failed(self) -> float:
        return sum(max(share) for share in self.shares)

    def _worse(self) -> tuple[float, float]:
        """The mean shares of failed pictures and of failed steps."""
        return fmean(pictures for pictures, _ in self.shares), fmean(steps for _, steps in self.shares)

    def _what(self) -> str:
        pictures, steps = self._worse()
        said = [f"{pictures:.0%} of the pictures could not be scored"] if pictures else []
        said += [f"{steps:.0%} of the steps were not taken, as the loss or gradient was not finite"] if steps else []
        return " and ".join(said)

    def _cause(self) -> str:
        pictures, steps = self._worse()
        causes = ["The log says why pictures failed"] if pictures else []
        causes += ["Look for weights that have diverged: a lower optimizer.learning_rate, or float32"] if steps else []
        return ". ".join(causes)
