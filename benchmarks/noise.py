"""How much of a policy gradient is signal: what splitting, weighting and masking do to the noise of one update.

    python -m benchmarks.noise

The signal's share is |E g|^2 / E |g|^2 for the gradient g of one update's policy term (4 prompts x 8 samples) at the
base policy. |E g|^2 is estimated without bias from the products of gradients of different batches, on the same pictures
for every variant; a share of 0.02 says that about 50 updates' gradients must be averaged for one of equal signal and
noise.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from varl import load_policy, log_probs, rollout
from varl.algorithm import group_advantages, token_masks, token_weights
from varl.prompts import PromptStream, resolve_prompts
from varl.rewards import load_reward
from varl.rollout import row_generators

PROMPTS, GROUP, MIDDLE = 4, 8, 4


@dataclass(frozen=True)
class Variant:
    """A policy term: trained steps, exponent of the step weights, whether masks are used."""

    label: str
    steps: range
    alpha: float
    masked: bool


ALL, PREFIX = range(5), range(MIDDLE)
VARIANTS = [
    Variant("all steps (vanilla)", ALL, 0.0, False),
    Variant("all steps, alpha 0.6", ALL, 0.6, False),
    Variant("all steps, masked", ALL, 0.0, True),
    Variant("prefix", PREFIX, 0.0, False),
    Variant("prefix, masked", PREFIX, 0.0, True),
    Variant("prefix, alpha 0.3, masked", PREFIX, 0.3, True),
    Variant("prefix, alpha 0.6, masked", PREFIX, 0.6, True),
    Variant("prefix, alpha 1, masked", PREFIX, 1.0, True),
    Variant("last grid alone", range(MIDDLE, 5), 0.0, False),
]


def signal_share(products_NN: Tensor) -> tuple[float, float]:
    """|E g|^2 / E |g|^2 and its standard error (jackknife) from the inner products of N independent gradients."""
    n = len(products_NN)
    own = products_NN.diagonal()
    rows = products_NN.sum(1) - own

    def share(pairs: Tensor, squares: Tensor, count: int) -> Tensor:
        return (pairs / (count * (count - 1))) / (squares / count)

    left_out = share(rows.sum() - 2 * rows, own.sum() - own, n - 1)
    error = ((n - 1) / n * (left_out - left_out.mean()).square().sum()).sqrt()
    return float(share(rows.sum(), own.sum(), n)), float(error)


def gradients(batches: int, seed: int) -> list[Tensor]:
    """The gradients of every variant, each [batches, parameters]."""
    policy = load_policy("inkling")
    reward = load_reward("ocr")
    stream = PromptStream(resolve_prompts("inkling:train", count=2048, seed=seed), seed=seed)
    schedule = policy.default_schedule
    parameters = list(policy.trainable.parameters())
    found: list[list[Tensor]] = [[] for _ in VARIANTS]
    for batch in track(range(batches), "gradients"):
        prompts = [prompt for _, prompt in stream.next(PROMPTS)]
        condition = policy.condition(prompts).repeat(GROUP)
        drawn = rollout(policy, condition, None, row_generators((seed, batch), condition.batch))
        output = reward(policy.decode(drawn.actions), [p for p in prompts for _ in range(GROUP)])
        advantage = group_advantages(output.score.view(PROMPTS, GROUP)).advantage_PG.flatten()
        mask = token_masks(output.regions or [], schedule.image_size, schedule)
        terms = -log_probs(policy, condition, drawn.actions).logp * advantage[:, None] / len(advantage)
        for variant, kept in zip(VARIANTS, found, strict=True):
            span = schedule.span(variant.steps)
            weight = token_weights([schedule.counts[s] for s in variant.steps], variant.alpha)
            loss = (terms[:, span] * weight * (mask[:, span] if variant.masked else 1)).sum()
            parts = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            flat = [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, parts, strict=True)]
            kept.append(torch.cat(flat))
    return [torch.stack(kept) for kept in found]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    table = Table(title=f"policy gradient of one update at the base, {a.batches} batches, seed {a.seed}")
    for column in ("policy term", "share of signal", "updates to equal signal and noise"):
        table.add_column(column)
    for variant, g in zip(VARIANTS, gradients(a.batches, a.seed), strict=True):
        share, error = signal_share((g @ g.T).double())
        table.add_row(variant.label, f"{share:.3f} ± {error:.3f}", f"{1 / share - 1:.0f}" if share > error else "")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
