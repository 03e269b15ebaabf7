"""What the log says of an update that has nothing to teach, or of settings that turn out to have no effect."""

from __future__ import annotations

import logging

from torch import Tensor

from varl.algorithm import Advantages
from varl.config import MaskConfig
from varl.rewards import RewardOutput

__all__ = ["Notices"]

logger = logging.getLogger(__name__)


class Notices:
    """Says each thing once: at the first of several updates in a row that have no variance, and once per run."""

    def __init__(self) -> None:
        self._no_variance = self._no_regions = False

    def no_variance(self, update: int, advantages: Advantages, learnt_from_P: Tensor, cancelled: bool) -> None:
        """No group of an update has anything to teach.

        Args:
            update: its number, from 1.
            learnt_from_P, cancelled: see ``varl.updates``.
        """
        none = cancelled or (not advantages.advantage_PG.any() and bool(advantages.zero_variance_P.any()))
        if none and not self._no_variance:
            what = "sequences" if cancelled else "returns"
            then = "its step follows the KL alone" if learnt_from_P.any() and not cancelled else "it takes no step"
            logger.warning("update %d: the %s of every group are equal; %s", update, what, then)
        self._no_variance = none

    def no_regions(self, output: RewardOutput, mask: MaskConfig) -> None:
        """A reward that gave scores and no regions leaves the settings of the mask without effect."""
        none = mask.enabled and output.regions is None
        if none and not self._no_regions and not output.failed.all():
            level = logging.INFO if mask == MaskConfig() else logging.WARNING
            logger.log(level, "the reward gives no regions, so every token is trained: method.mask has no effect")
            self._no_regions = True
