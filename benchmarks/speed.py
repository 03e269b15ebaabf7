"""Seconds of VAR d16 (random weights, 256 px, fp32) on this machine, over the speed of its matrix product.

    python -m benchmarks.speed

Generation: guided (4, top-k 900, top-p 0.96), a batch of 4, with the decoder. Training: forward and backward of all
log-probabilities, a batch of 2. Each is measured in turn with a 4096-cubed fp32 matrix product, so that a machine that
slows down slows both; "products" is the time in units of that product's, medians of the rounds. Upstream's code on two
cores of a Xeon whose product ran at 255 GFLOP/s took 5.6 s a picture and 11.6 s a training pass.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from varl import Prompt, Sampling, load_policy, log_probs, rollout

SIDE = 4096
PRODUCT_FLOP = 2 * SIDE**3
UPSTREAM_PRODUCT = PRODUCT_FLOP / 255e9
UPSTREAM = {"picture (batch of 4)": 5.6, "training pass (batch of 2)": 11.6}


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    policy = load_policy("var", {"size": "d16"}, "random")
    four, two = (policy.condition([Prompt(label=i) for i in range(n)]) for n in (4, 2))
    actions = torch.randint(policy.classes, (2, four.schedule.tokens))
    left, right = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE)
    sampling = Sampling(guidance=4.0, top_k=900, top_p=0.96)

    def picture() -> None:
        policy.decode(rollout(policy, four, sampling).actions)

    def training() -> None:
        log_probs(policy, two, actions).logp.sum().backward()
        policy.trainable.zero_grad()

    work = {"picture (batch of 4)": (picture, 4), "training pass (batch of 2)": (training, 1)}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
    seconds(lambda: left @ right)
    for _ in range(a.rounds):
        for name, (call, share) in work.items():
            product = seconds(lambda: left @ right)
            found[name].append((seconds(call) / share, product))
    table = Table(title=f"VAR d16, {a.threads} threads, medians of {a.rounds} rounds")
    for column in ("", "seconds", "product, GFLOP/s", "products", "products, upstream", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    for name, pairs in found.items():
        own = statistics.median(s / product for s, product in pairs)
        product = statistics.median(product for _, product in pairs)
        upstream = UPSTREAM[name] / UPSTREAM_PRODUCT
        row = [statistics.median(s for s, _ in pairs), PRODUCT_FLOP / product / 1e9, own, upstream, own / upstream]
        table.add_row(name, *(f"{value:.{d}f}" for value, d in zip(row, (2, 0, 1, 1, 2), strict=True)))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
