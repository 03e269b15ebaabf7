"""When failing rewards and skipped steps are too many for a run to go on."""

from __future__ import annotations

from collections import deque

from varl.errors import RunError

__all__ = ["FailureWindow"]


class FailureWindow:
    """The failed shares of the last updates, against the share that is allowed.

    Args:
        window: how many updates it looks at.
        allowed: the mean failed share over a whole window that is still allowed, in [0, 1]. The window need not be
            full: with 20 and 0.5, the 11th update in a row that fails entirely is one too many.

    Attributes:
        shares: of the last updates, oldest first.
    """

    def __init__(self, window: int, allowed: float) -> None:
        self.window, self.allowed = window, allowed
        self.shares: deque[float] = deque(maxlen=window)

    def add(self, pictures: float, steps: float) -> RunError | None:
        """Count an update.

        Args:
            pictures: share of its pictures that could not be scored.
            steps: share of its optimizer steps that were skipped, for a loss or gradient that is not finite or because
                no group was left.

        Returns:
            The error to stop with, if there were too many. The window is then empty, so that the run can go on once
            the cause is mended.
        """
        self.shares.append(max(pictures, steps))
        if sum(self.shares) <= self.allowed * self.window:
            return None
        counted = len(self.shares)
        mean = sum(self.shares) / counted
        self.shares.clear()
        return RunError(
            f"in the last {counted} updates {mean:.0%} of the pictures or steps failed; run.max_failed_share allows "
            f"{self.allowed:.0%} of {self.window} updates. The log says why pictures failed; the same command goes on "
            "from here"
        )
