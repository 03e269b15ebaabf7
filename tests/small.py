"""Small random policies and prompts, and a counter of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from varl.models.inkling import Inkling, InklingConfig
from varl.models.inkling.text import make_prompt, random_regions
from varl.policy import Prompt

SMALL = InklingConfig(grids=(1, 2, 3, 6, 12), codes=64, coarse=8, fine=4, decoder=8, width=32, depth=2, heads=2)


def make_inkling(seed: int = 0, config: InklingConfig = SMALL) -> Inkling:
    """A random Inkling whose distributions are far from uniform, and depend on what was drawn and asked for."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        policy = Inkling(config)
        policy.transformer.head.weight.data.mul_(25)
        policy.tokenizer.encoder.coarse.normal_()
        policy.tokenizer.encoder.fine.normal_()
    return policy.eval()


def make_prompts(count: int, seed: int = 0) -> list[Prompt]:
    rng = np.random.default_rng(seed)
    return [make_prompt(random_regions(rng)) for _ in range(count)]


@contextmanager
def counting(module: torch.nn.Module) -> Iterator[list[int]]:
    """The tokens (rows times positions) of every call of a module."""
    counts: list[int] = []
    hook = module.register_forward_hook(lambda _, inputs, __: counts.append(inputs[0].shape[:-1].numel()))
    try:
        yield counts
    finally:
        hook.remove()
