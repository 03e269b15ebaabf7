"""A Python reward in a process of its own: its crash, its end or its hang costs the pictures at hand only."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from multiprocessing.util import Finalize
from typing import Any

import numpy as np
import torch
from torch import Tensor

from varl.policy import Prompt
from varl.rewards.base import RewardOutput
from varl.rewards.checks import MOST_POINTS
from varl.rewards.guard import Told
from varl.rewards.host import LONGEST_S, Host, NotStarted
from varl.rewards.python import import_callable

__all__ = ["ProcessCall"]


class ProcessCall:
    """Calls what "module:attribute" names in another process, which is started here and replaced when it is lost.

    Each call seeds the other process's random generators from torch's of this one, which a run saves: a reward that
    draws from them gives the same numbers when the run is resumed. What the reward itself keeps between calls is lost
    with the process. It sees pictures on the CPU.

    Args:
        spec, options: as for ``import_callable``.
        timeout_s: seconds a call may take before the process is killed; None: no limit.

    Raises:
        ValueError: if the callable cannot be made; with the type, the message and the line of the error.
    """

    def __init__(self, spec: str, options: Mapping[str, Any], timeout_s: float | None = None) -> None:
        if timeout_s is not None and not 0 < timeout_s <= LONGEST_S:
            right = f"positive, and at most {LONGEST_S:g} seconds"
            raise ValueError(f"reward {spec!r}: timeout_s must be {right}, got {timeout_s}")
        make = partial(_Answers, spec, dict(options), os.getcwd(), torch.get_num_threads())
        self._host = Host(make, f"process of reward {spec!r}", "a call", timeout_s)
        Finalize(self, self._host.close, (2.0,), exitpriority=10)
        try:
            self._host.start()
        except NotStarted as error:
            raise ValueError(str(error)) from error
        self.timeout_s = timeout_s

    def describe(self) -> dict[str, str]:
        """What the callable says of itself, and that it runs in a process of its own."""
        limit = "no time limit" if self.timeout_s is None else f"time limit {self.timeout_s:g} s a call"
        return {**self._host.ask(("describe",)), "process": limit}

    def check(self, prompts: Sequence[Prompt]) -> None:
        """The callable's own check, if it has one.

        Raises:
            ValueError: with what it said.
        """
        try:
            self._host.ask(("check", list(prompts)))
        except Told as error:
            raise ValueError(str(error)) from error

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> RewardOutput:
        seed = int(torch.randint(2**31, (), dtype=torch.int64))
        fields = self._host.ask(("score", images.detach().float().cpu().numpy(), list(prompts), seed))
        as_tensors = {name: torch.from_numpy(value) for name, value in fields.pop("parts").items()}
        score, failed = (torch.from_numpy(fields.pop(name)) for name in ("score", "failed"))
        return RewardOutput(score, failed, parts=as_tensors, **fields)

    def close(self) -> None:
        """End the process; a later call starts it again."""
        self._host.close(2.0)


class _Answers:
    """Answers the other process's requests."""

    def __init__(self, spec: str, options: Mapping[str, Any], folder: str, threads: int) -> None:
        os.chdir(folder)
        torch.set_num_threads(threads)
        self.fn = import_callable(spec, options)

    def __call__(self, request: tuple[Any, ...]) -> Any:
        kind, *given = request
        if kind == "score":
            return self.score(*given)
        own = getattr(self.fn, kind, None)
        said = own(*given) if callable(own) else {}
        return {str(k): str(v) for k, v in said.items()} if kind == "describe" else None

    def score(self, images: np.ndarray, prompts: list[Prompt], seed: int) -> dict[str, Any]:
        """The fields of a ``RewardOutput``, as arrays: torch would send tensors through shared memory."""
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        batch = len(prompts)  # as it is before the call
        result = self.fn(torch.from_numpy(images), prompts)
        output = result if isinstance(result, RewardOutput) else RewardOutput.from_scores(result, batch)
        regions = output.regions
        if regions is not None:  # one more of each than there may be: they are checked where they arrive
            regions = [
                [np.asarray(polygon, np.float32) for polygon in islice(own, MOST_POINTS + 1)]
                for own in islice(regions, batch + 1)
            ]
        return {
            "score": _array(output.score),
            "failed": _array(output.failed),
            "regions": regions,
            "parts": {name: _array(value) for name, value in output.parts.items()},
            "texts": output.texts,
        }


def _array(values: Any) -> np.ndarray:
    array: np.ndarray = torch.as_tensor(values).detach().cpu().numpy()
    return array
