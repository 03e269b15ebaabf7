"""How a grid is drawn from logits: guidance, temperature, top-k and top-p, one draw."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from varl.transfer import sent

__all__ = ["LOGITS", "Sampling", "draw", "filter_logits"]

LOGITS = 2**23
"""Logits that are held at once; several tensors of their size are, while they are made and differentiated."""

COLDEST = 1e-6
"""The lowest temperature: logits divided by less could leave the range of their type."""


@dataclass(frozen=True)
class Sampling:
    """Sampling settings; the defaults draw from the model itself, unguided and untruncated.

    Attributes:
        guidance: classifier-free guidance as the extra weight on the condition: the logits are
            (1 + t) * conditional - t * unconditional, with t = guidance times the family's ramp at that step.
            0 is off, and then no unconditional pass is made.
        top_k: keep the k most likely classes; 0 keeps all.
        top_p: keep the most likely classes until their probability reaches p; 1 keeps all.
        temperature: divides the logits before truncation; at least 1e-6.
    """

    guidance: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.guidance < math.inf:
            raise ValueError(f"guidance must be 0 or more, got {self.guidance}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or a number of classes, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not COLDEST <= self.temperature < math.inf:
            raise ValueError(
                f"temperature must be at least {COLDEST:g}, and finite, got {self.temperature}; top_k 1 is greedy"
            )

    @property
    def is_plain(self) -> bool:
        """Whether draws come from the model's own conditional distribution."""
        return self.guidance == 0 and self.top_k == 0 and self.top_p == 1 and self.temperature == 1


def filter_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """Temperature, then top-k, then top-p; classes that cannot be drawn become -inf.

    Ties with the k-th largest value stay; the most likely class always stays.

    Args:
        logits: [..., classes].

    Returns:
        [..., classes], unnormalised.

    Raises:
        ValueError: if top_k exceeds the number of classes.
    """
    classes = logits.shape[-1]
    if sampling.top_k > classes:
        raise ValueError(f"top_k is {sampling.top_k}, but there are only {classes} classes")
    if sampling.top_k in (0, classes) and sampling.top_p == 1:
        return logits / sampling.temperature if sampling.temperature != 1 else logits
    flat = logits.reshape(-1, logits.shape[-1])
    parts = [_filtered(part, sampling) for part in flat.split(_at_once(flat))]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(logits.shape)


def _at_once(logits_NV: Tensor) -> int:
    """Positions to work on at a time: what is made of their logits on the way is several times their size."""
    return max(LOGITS // logits_NV.shape[-1], 1)


def _none(flags: Tensor) -> bool:
    """Whether no flag is set, as far as the host knows: on the CPU. For no number of a device does it wait."""
    return flags.device.type == "cpu" and not flags.numpy().any()


def _filtered(logits_NV: Tensor, sampling: Sampling) -> Tensor:
    logits = logits_NV / sampling.temperature if sampling.temperature != 1 else logits_NV
    if not 0 < sampling.top_k < logits.shape[-1]:
        return _top_p(logits, sampling.top_p)
    values = logits.topk(sampling.top_k + 1, dim=-1).values
    least, spare = values[:, -2:-1], torch.zeros(0)
    if sampling.top_p < 1:
        least, spare = _least_kept(logits, values, sampling.top_p)
    drop = logits < least
    if not _none(spare > 0):
        # Of classes that are alike the first ones go first, as where all classes are sorted.
        alike = logits == least
        drop |= alike & (alike.cumsum(-1, dtype=torch.int32) <= spare)
    return logits.masked_fill(drop, -torch.inf)


def _least_kept(logits_NV: Tensor, values_NK: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """What top-p keeps of the classes that top-k left: the k largest, and ties with the last of them.

    Args:
        values_NK: the k + 1 largest logits, largest first.

    Returns:
        The least value kept, and how many of the classes with that value are not, both [N, 1].
    """
    values, last = values_NK[:, :-1], values_NK[:, -2:-1]
    beyond = values_NK[:, -1:] == last  # ties that are not among the k largest; they go before all others
    if not _none(beyond):
        beyond = (logits_NV == last).sum(-1, keepdim=True) - (values == last).sum(-1, keepdim=True)
    p = values.softmax(-1)
    p = p / (1 + beyond * p[:, -1:])
    drop = beyond * p[:, -1:] + p.flip(-1).cumsum(-1).flip(-1) <= 1 - top_p
    drop[:, 0] = False
    least = values.gather(-1, (~drop).sum(-1, keepdim=True) - 1)
    spare = (drop & (values == least)).sum(-1, keepdim=True)
    return least, torch.where(least == last, spare + ((1 - top_p) / p[:, -1:]).floor().minimum(beyond), spare)


def _top_p(logits_NV: Tensor, top_p: float) -> Tensor:
    ascending, order = logits_NV.sort(dim=-1, stable=True)
    drop = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
    drop[:, -1] = False
    return logits_NV.masked_fill(drop.scatter(-1, order, drop), -torch.inf)


def draw(logits: Tensor, generators: list[torch.Generator] | torch.Generator | None = None) -> Tensor:
    """One independent draw per position, from already filtered logits.

    By inverting the cumulative distribution at one uniform number a position; with one generator a row, a row's draws
    do not depend on the batch it is in. The numbers are made where the generators live, so that generators of the CPU
    draw the same from logits on any device.

    Args:
        logits: [batch, ..., classes].
        generators: one for all rows, or a list with one a row; None is torch's global generator.

    Returns:
        int64 [batch, ...].
    """
    first = generators[0] if isinstance(generators, list) and generators else generators
    device = first.device if isinstance(first, torch.Generator) else logits.device
    uniform = torch.empty(logits.shape[:-1], dtype=torch.float32, device=device)
    if isinstance(generators, list):
        if len(generators) != len(logits):
            raise ValueError(f"{len(generators)} generators were given for {len(logits)} rows")
        for row, generator in zip(uniform, generators, strict=True):
            row.uniform_(generator=generator)
    else:
        uniform.uniform_(generator=generators)
    # Two units below 1 at most, so that rounding cannot take the product up to the whole sum, behind the last class.
    uniform.clamp_(max=1 - 2**-22)
    flat = logits.reshape(-1, logits.shape[-1])
    numbers = sent(uniform, logits.device).flatten().unsqueeze(-1)
    count = _at_once(flat)
    drawn = [_inverted(*part) for part in zip(flat.split(count), numbers.split(count), strict=True)]
    return torch.cat(drawn).view(logits.shape[:-1])


def _inverted(logits_NV: Tensor, uniform_N1: Tensor) -> Tensor:
    p = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)).softmax(-1)
    below = p.cumsum(-1)
    # Logits that are NaN reach no class: the last one stands for them.
    drawn = torch.searchsorted(below, uniform_N1 * below[:, -1:], right=True).clamp_(max=logits_NV.shape[-1] - 1)
    impossible = p.gather(-1, drawn) == 0
    if not _none(impossible):
        # A sum made in parallel may step up where a class has no probability.
        drawn = torch.where(impossible, p.argmax(-1, keepdim=True), drawn)
    return drawn.squeeze(-1)
