"""Achieved FLOP/s of sampling and training at VAR-d16 width, over those of a large matrix product of the same run."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks import flops
from benchmarks.measure import Goal, Row, Settings, generators, in_turn, product
from benchmarks.shapes import Bench, Precision, paper, var_shaped
from varl.config import MethodConfig
from varl.rollout import rollout
from varl.sampling import Sampling
from varl.scoring import log_probs

__all__ = ["TITLE", "rows"]

TITLE = "fraction of the machine: FLOP/s of a stage over FLOP/s of a 4096-cubed matrix product (ours / baseline)"


def rows(settings: Settings, folder: Path) -> list[Row]:
    """Sampling from the 8x8 grid up, forward and backward, and forward alone; fp32 on a CPU, bf16 on a GPU."""
    on_gpu = settings.device != "cpu"
    depth, count = (4, 8) if settings.full else (2, 4)
    method = MethodConfig(middle="grid:8", prompts=1)
    precision: Precision = "bfloat16" if on_gpu else "float32"
    config = var_shaped(256, 1024, depth, method=method, sampling=Sampling(), precision=precision)
    trainer = Bench(config, settings, folder).trainer
    policy, schedule = trainer.policy, trainer.schedule
    shape = flops.Shape.of(policy)
    prompts = [prompt for _, prompt in trainer.stream.next(1)] * count
    condition = policy.condition(prompts, schedule)
    own = generators(policy, (settings.seed,), count)
    first = schedule.middle("grid:8") - 1
    every, fine = range(len(schedule)), range(first, len(schedule))
    with trainer.precision():
        starts = {s: rollout(policy, condition, s, own, until=first, keep_state=True) for s in (Sampling(), paper())}
        actions = rollout(policy, condition, Sampling(), own).actions
    multiply, product_flop = product(settings, torch.bfloat16 if on_gpu else torch.float32)

    def sample(sampling: Sampling) -> None:
        with trainer.precision():
            rollout(policy, condition, sampling, own, start=starts[sampling])

    def train() -> None:
        with trainer.precision():
            log_probs(policy, condition, actions).logp.sum().backward()
        policy.trainable.zero_grad()

    @torch.no_grad()
    def score() -> None:
        with trainer.precision():
            log_probs(policy, condition, actions)

    whole, upper = (count * flops.forward(shape, schedule, steps) for steps in (every, fine))
    work = {
        "forward and backward": (train, count * flops.training(shape, schedule, every), Goal(0.45 if on_gpu else 0.6)),
        "sampling from 8x8 up": (lambda: sample(Sampling()), upper, None if on_gpu else Goal(0.5)),
        "sampling from 8x8 up, guided, top-k, top-p": (lambda: sample(paper()), 2 * upper, None),
        "forward alone (reference)": (score, whole, None),
    }
    seconds = in_turn({"product": multiply, **{name: call for name, (call, _, _) in work.items()}}, settings)
    speed = [product_flop / s / 1e9 for s in seconds["product"]]
    group = f"VAR-d16 width, depth {depth}, 256 px, {count} rows, {precision}"
    return [
        Row.share(group, name, "GFLOP/s", [operations / s / 1e9 for s in seconds[name]], speed, "ours / product", goal)
        for name, (_, operations, goal) in work.items()
    ]
