"""Which half of a tuned policy earns its reward: tuned prefixes continued by the base, and base prefixes by the tuned.

    python -m benchmarks.attribution --out runs/results

For the tuned weights that ``benchmarks.results run`` left behind. Held-out prompts, one fixed seed of draws.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.curves import interval
from benchmarks.results import METHODS, folder
from varl import load_policy, rollout
from varl.policy import Policy, Prompt
from varl.prompts import resolve_prompts
from varl.rewards import Reward, load_reward
from varl.rollout import replay, row_generators

HALVES = {"both": (True, True), "prefix only": (True, False), "suffix only": (False, True)}
"""Which half is the tuned policy's: (prefix, suffix)."""


@torch.no_grad()
def word_accuracy(head: Policy, tail: Policy, m: int, prompts: list[Prompt], reward: Reward) -> float:
    """Mean share of words read when ``head`` draws the first ``m`` steps and ``tail`` the others."""
    condition = head.condition(prompts)
    prefix = rollout(head, condition, None, row_generators((0,), len(prompts)), until=m)
    start = replay(tail, tail.condition(prompts), prefix.actions, m)
    whole = rollout(tail, start.condition, None, row_generators((1,), len(prompts)), start=start)
    return float(reward(tail.decode(whole.actions), prompts).parts["word_accuracy"].mean())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/results"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--middle", default="grid:6")
    parser.add_argument("--count", type=int, default=128, help="held-out prompts")
    a = parser.parse_args()
    base = load_policy("inkling")
    m = base.default_schedule.middle(a.middle)
    prompts = resolve_prompts("inkling:held-out", count=a.count, seed=1)
    reward = load_reward("ocr")
    start = word_accuracy(base, base, m, prompts, reward)
    table = Table(title=f"word accuracy, {a.count} held-out prompts, {a.seeds} seeds; base {start:.3f}")
    for column in ("tuned by", *HALVES):
        table.add_column(column)
    for name, method in METHODS.items():
        found: dict[str, list[float]] = {half: [] for half in HALVES}
        for seed in range(a.seeds):
            tuned = load_policy("inkling", weights=folder(a.out, name, seed) / "weights.safetensors")
            for half, (prefix, suffix) in HALVES.items():
                pair = (tuned if prefix else base, tuned if suffix else base)
                found[half].append(word_accuracy(*pair, m, prompts, reward))
        cells = [interval(np.array(found[half])) for half in HALVES]
        table.add_row(method.label, *(f"{mean:.3f} ± {half:.3f}" for mean, half in cells))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
