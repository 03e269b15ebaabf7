"""What the OCR reads in Inkling's held-out pictures, and in what its tokenizer makes of them.

python -m benchmarks.ceiling

Reconstructions are the ceiling of what reinforcement learning can reach.
"""

from __future__ import annotations

import argparse

import numpy as np
from rich.console import Console
from rich.table import Table

from varl.evaluation.held_out import Estimate, Evaluation
from varl.models.inkling import Inkling
from varl.models.inkling.checkpoint import load
from varl.models.inkling.pretrain import sample_batch
from varl.rewards.ocr import OcrReward, word_hits


def read_share(policy: Inkling, count: int, seed: int) -> dict[str, Estimate]:
    """Word accuracy with its interval, on the pictures, their reconstructions, and those without the last grid."""
    images, prompts = sample_batch((seed, 4), count, held_out=True)
    actions = policy.encode(images)
    early = actions[:, : policy.default_schedule.offsets[-2]]
    reward, found = OcrReward({"threads": 2}), {}
    for name, shown in (
        ("pictures", images),
        ("reconstructions", policy.decode(actions)),
        ("without the last grid", policy.decode(early)),
    ):
        output = reward(shown, prompts)
        texts = output.texts or []
        hits = np.array([float(sum(word_hits(p.words, [t]))) for p, t in zip(prompts, texts, strict=True)])
        result = Evaluation(prompts, 1, shown, texts, output.score.numpy(), hits, hits)
        found[name] = result.estimate("word_accuracy")
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights")
    options = parser.parse_args()
    table = Table("what is read", "word accuracy", title=f"{options.count} held-out pictures, seed {options.seed}")
    for name, estimate in read_share(load(weights=options.weights), options.count, options.seed).items():
        table.add_row(name, str(estimate))
    Console().print(table)


if __name__ == "__main__":
    main()
