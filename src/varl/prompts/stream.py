"""An endless stream over a list of prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from varl.policy import Prompt

__all__ = ["PromptStream"]


class PromptStream:
    """An endless shuffled stream over a list of prompts, which a resumed run takes up where it stopped.

    Every epoch gives each prompt once, in a new order drawn from (seed, epoch). A batch holds no prompt twice, unless
    it is larger than the list: where a batch ends one epoch and begins the next, prompts that it holds already come
    later in the new epoch.

    Args:
        prompts: what to draw from.
        seed: of the orders.

    Attributes:
        position: how many prompts were drawn so far.

    Raises:
        ValueError: if there is no prompt.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int = 0) -> None:
        if not prompts:
            raise ValueError("a prompt stream needs at least one prompt, got none")
        self.prompts, self.seed = list(prompts), seed
        self.position = 0
        # What the batch that began this epoch took from it; all else about the order follows from (seed, epoch).
        self._head: list[int] = []
        self._order = self._epoch_order()

    @property
    def epoch(self) -> int:
        """Which pass over the prompts the next one belongs to, from 0."""
        return self.position // len(self.prompts)

    def next(self, n: int) -> list[tuple[int, Prompt]]:
        """The next ``n`` prompts, each with its number in the stream (0, 1, 2, ... over all epochs), for seeding.

        Raises:
            ValueError: if ``n`` is less than 1.
        """
        if n < 1:
            raise ValueError(f"a batch needs at least one prompt, got {n}")
        size = len(self.prompts)
        batch: list[int] = []
        for drawn in range(n):
            if self.position % size == 0:
                # Prompts drawn before a whole number of lists are repeated anyway.
                seen = set(batch[drawn - drawn % size :])
                self._head = []
                fresh = [i for i in self._epoch_order() if i not in seen]
                self._head = fresh[: n - drawn] if seen else []
                self._order = self._epoch_order()
            batch.append(self._order[self.position % size])
            self.position += 1
        return [(self.position - n + drawn, self.prompts[i]) for drawn, i in enumerate(batch)]

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is: plain numbers, fit for JSON."""
        return {
            "position": self.position, "head": list(self._head), **self._identity()
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict()`` of a stream over the same prompts.

        Raises:
            ValueError: if the state is of a stream with another seed or other prompts.
        """
        for name, value in self._identity().items():
            if state[name] != value:
                raise ValueError(
                    f"the stream to resume had {name} {state[name]}, this one has {value}; they must agree"
                )
        self.position, self._head = int(state["position"]), list(state["head"])
        # At the end of an epoch the order is that of the epoch to come, which next() draws.
        self._order = self._epoch_order()

    def _identity(self) -> dict[str, Any]:
        digest = hashlib.sha256(repr(self.prompts).encode()).hexdigest()
        return {"seed": self.seed, "prompts": len(self.prompts), "digest of the prompts": digest}

    def _epoch_order(self) -> list[int]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self.prompts)).tolist()
        taken = set(self._head)
        return self._head + [i for i in order if i not in taken]
