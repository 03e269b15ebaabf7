"""Enumerable decision processes for the theory of method.md, section 3a. Everything is exact, in float64."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


class Toy:
    """r_1 one binary token; r_2 two independent binary tokens; the reference uniform; eta 1.

    R = c if r_1 = 0 and the two tokens of r_2 agree, 0 if they do not; R = b if r_1 = 1.
    """

    def __init__(self, c: float, b: float) -> None:
        self.c, self.b = c, b
        pairs = list(itertools.product((0, 1), (0, 1)))
        # [r_1, suffix]: the suffixes in the order 00 01 10 11.
        self.rewards = torch.tensor([[c if a == d else 0.0 for a, d in pairs], [b] * 4], dtype=torch.float64)
        self.old = torch.full((2, 4), 0.25, dtype=torch.float64)

    def factorised(self, p: float, q: float) -> Tensor:
        """The suffix distribution [4] of two independent tokens that are 0 with probabilities p and q."""
        tokens = torch.tensor([[p, 1 - p], [q, 1 - q]], dtype=torch.float64)
        return torch.outer(tokens[0], tokens[1]).flatten()

    def suffix_value(self, state: int, probabilities: Tensor) -> float:
        """E[R] - KL(probabilities || old) from a state."""
        p = probabilities
        return float((p * self.rewards[state]).sum() - (p * (p / self.old[state]).log()).sum())

    def constrained(self, state: int) -> tuple[float, set[tuple[float, float]]]:
        """V+ of a state and where it is reached, (p, q) rounded: the best of a fine grid of (p, q)."""
        axis = torch.linspace(0.0001, 0.9999, 1999, dtype=torch.float64)
        p, q = axis[:, None], axis[None, :]
        entropy_p = -(axis * axis.log() + (1 - axis) * (1 - axis).log())
        agree = p * q + (1 - p) * (1 - q)
        reward = self.c * agree if state == 0 else torch.full_like(agree, self.b)
        value = reward - 2 * torch.tensor(2.0).double().log() + entropy_p[:, None] + entropy_p[None, :]
        best = value.max()
        where = (value >= best - 1e-8).nonzero()
        return float(best), {(round(float(axis[i]), 3), round(float(axis[j]), 3)) for i, j in where}

    def objective(self, prefix_reward: Tensor, suffix_values: Tensor) -> float:
        """J of the prefix that is optimal for ``prefix_reward`` [2] and then earns ``suffix_values`` [2]."""
        prefix = (0.5 * prefix_reward.exp()) / (0.5 * prefix_reward.exp()).sum()
        return float((prefix * suffix_values).sum() - (prefix * (prefix / 0.5).log()).sum())


class Tree:
    """A random process without the factorisation constraint: ``sizes`` values a grid, random reference."""

    def __init__(self, sizes: tuple[int, ...], eta: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.sizes, self.eta = sizes, eta
        self.old = torch.ones((), dtype=torch.float64)
        for step, size in enumerate(sizes):
            logits = torch.randn(*sizes[: step + 1], generator=generator, dtype=torch.float64)
            self.old = self.old[..., None] * logits.softmax(-1)
            assert self.old.shape[-1] == size
        self.rewards = 2 * torch.randn(*sizes, generator=generator, dtype=torch.float64)

    def split(self, m: int) -> tuple[Tensor, Tensor, Tensor]:
        """old(s_m) [S], old(suffix | s_m) [S, K], rewards [S, K] for the prefix of m grids."""
        states = 1
        for size in self.sizes[:m]:
            states *= size
        joint = self.old.reshape(states, -1)
        prefix = joint.sum(1)
        return prefix, joint / prefix[:, None], self.rewards.reshape(states, -1)

    def objective(self, joint: Tensor) -> float:
        """E[R] - eta KL(joint || old) of a distribution over whole sequences, any shape."""
        joint = joint.reshape(self.sizes)
        return float((joint * self.rewards).sum() - self.eta * (joint * (joint / self.old).log()).sum())

    def optimum(self) -> Tensor:
        weight = self.old * (self.rewards / self.eta).exp()
        return weight / weight.sum()
