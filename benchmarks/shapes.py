"""The models and recipes that ``python -m benchmarks`` runs, and a trainer made ready for measuring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.measure import Settings, now
from benchmarks.naive import Clock, draw_from_scratch
from benchmarks.naive import learn as learn_naively
from varl import updates
from varl.config import (
    EvaluationConfig,
    MethodConfig,
    OptimizerConfig,
    PolicyConfig,
    PromptConfig,
    RunConfig,
    TrainConfig,
)
from varl.learner import Batch
from varl.models.var.model import initialise
from varl.policy import Prompt
from varl.sampling import Sampling
from varl.trainer import Sampled, Trainer

__all__ = [
    "SIDES",
    "Bench",
    "Extent",
    "Naive",
    "Precision",
    "Step",
    "brightness",
    "extent",
    "inkling",
    "paper",
    "sides",
    "var_shaped",
]

SIDES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 48, 64)
"""The grids of the paper's Table 6, for 1024 pixels; smaller pictures end earlier."""
NO_STEP = 1e-12
"""A learning rate that moves no weight, so that every round measures the same update."""

Kind = Literal["prefix", "suffix", "full"]
Precision = Literal["float32", "bfloat16"]


def sides(pixels: int) -> tuple[int, ...]:
    """The grids for square pictures of this side."""
    return tuple(side for side in SIDES if side * 16 <= pixels)


def paper() -> Sampling:
    """The paper's sampling: guided and truncated."""
    return Sampling(guidance=5.0, top_k=2, top_p=0.9)


def brightness(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """A reward that costs nothing: how much brighter the left half is."""
    half = images.shape[-1] // 2
    return 100 * (images[..., :half].mean((1, 2, 3)) - images[..., half:].mean((1, 2, 3)))


def var_shaped(
    pixels: int,
    width: int,
    depth: int,
    *,
    method: MethodConfig,
    sampling: Sampling,
    micro_batch: int = 4,
    precision: Precision = "float32",
) -> TrainConfig:
    """A run of VAR at the paper's grids: heads of 64, vocabulary 4096, random weights, a small tokenizer."""
    transformer = {"embed_dim": width, "num_heads": width // 64, "depth": depth, "patch_nums": sides(pixels)}
    tokenizer = {"ch": 32, "ch_mult": (1, 1, 1, 1, 1), "num_res_blocks": 1}
    config = {"transformer": transformer, "tokenizer": tokenizer}
    return TrainConfig(
        policy=PolicyConfig("var", "random", config, precision=precision),
        prompts=PromptConfig("labels:0-999"),
        reward="benchmarks.shapes:brightness",
        sampling=sampling,
        method=replace(method, beta=1.0),
        evaluation=EvaluationConfig(enabled=False),
        run=RunConfig(micro_batch=micro_batch),
    )


@dataclass(frozen=True)
class Extent:
    """How large the VAR is that most sections measure, and what an update of it takes.

    Attributes:
        batches: rows at which the best cost of a token is looked for.
    """

    width: int
    depth: int
    pixels: int
    middle: str
    group: int
    micro_batch: int
    batches: tuple[int, ...]

    @property
    def name(self) -> str:
        """What tables call it."""
        width = "VAR-d16 width" if self.width == D16 else f"VAR of width {self.width}"
        return f"{width}, depth {self.depth}, {self.pixels} px"

    def config(self, sampling: Sampling, **method: Any) -> TrainConfig:
        """A run of it: one prompt, two continuations."""
        one = replace(MethodConfig(middle=self.middle, prompts=1, group=self.group, continuations=2), **method)
        of = (self.pixels, self.width, self.depth)
        return var_shaped(*of, method=one, sampling=sampling, micro_batch=self.micro_batch)


D16 = 1024
"""The width of VAR-d16."""


def extent(settings: Settings) -> Extent:
    """The shape for a machine: what two cores do in seconds says nothing of a GPU."""
    if settings.short and settings.device == "cpu":
        return Extent(64, 1, 64, "grid:3", group=4, micro_batch=4, batches=(4,))
    if settings.short:
        return Extent(D16, 4, 256, "grid:8", group=16, micro_batch=16, batches=(16, 32))
    if settings.full:
        return Extent(D16, 2, 256, "grid:8", group=8, micro_batch=4, batches=(2, 4, 8))
    return Extent(D16, 1, 256, "grid:8", group=4, micro_batch=4, batches=(2, 4))


def inkling(continuations: int, threads: int) -> TrainConfig:
    """The demo's recipe (recipes/inkling-ocr.yaml), with this many continuations."""
    method = MethodConfig(middle="grid:6", prompts=4, group=8, continuations=continuations, alpha=0.3)
    return TrainConfig(
        prompts=PromptConfig(count=2048),
        reward={"name": "ocr", "engine": {"threads": threads}},
        method=method,
        evaluation=EvaluationConfig(enabled=False),
        run=RunConfig(micro_batch=32),
    )


class FirstChannels(nn.Module):
    """Stands for a decoder where that would dominate: the first three channels of the features are the picture."""

    def forward(self, features_BCHW: Tensor) -> Tensor:
        return features_BCHW[:, :3]


@dataclass
class Step:
    """One update as the trainer took it: seconds in all and by stage, its record, and what it learnt from."""

    seconds: float
    stages: dict[str, float]
    record: dict[str, Any]
    batch: Batch


@dataclass
class Naive:
    """The same update, naively: seconds by stage, all it drew, and how that and the step compare."""

    finished: Tensor
    seconds: dict[str, float]
    loss: float
    norm: float
    same_tokens: float


class Bench:
    """A trainer whose updates can be repeated: same prompts, same draws, weights that do not move.

    Args:
        config: of the run; how long it is and where it goes are set here.
        folder: where its run folder is made.
        decoder: False decodes nothing (see ``FirstChannels``).
    """

    def __init__(self, config: TrainConfig, settings: Settings, folder: Path, decoder: bool = True) -> None:
        out = folder / f"run-{len(list(folder.iterdir()))}"
        run = replace(
            config.run, out=out, device=settings.device, seed=settings.seed, gallery_every=0, diagnose_every=0,
            threads=settings.threads,
        )  # fmt: skip
        method = replace(config.method, update="alternate", prefix_updates=1, suffix_updates=1)
        still = OptimizerConfig(learning_rate=NO_STEP, warmup_updates=0)
        torch.manual_seed(settings.seed)
        self.settings = settings
        self.trainer = Trainer(replace(config, run=run, method=method, optimizer=still))
        policy: Any = self.trainer.policy
        if config.policy.weights == "random":
            initialise(policy.transformer, gate=1.0)
            with torch.no_grad():
                policy.transformer.head.weight.mul_(50)  # undoes a nearly uniform start, which makes every KL 0
        if not decoder:
            policy.tokenizer.decoder = FirstChannels()
        if self.trainer.reference is not None:
            # Equal to the policy it would make every KL 0, and losses agree for no reason.
            with torch.no_grad():
                for own, other in zip(
                    self.trainer.reference.trainable.parameters(), policy.trainable.parameters(), strict=True
                ):
                    own.copy_(other + 0.3 * other.std(correction=0) * torch.randn_like(other))
        self.naive_optimizer = torch.optim.AdamW(self.trainer.learner.parameters, lr=NO_STEP)
        self._start = self.trainer.stream.state_dict()
        self._kept: Sampled | None = None

    def plan(self, kind: Kind) -> updates.Plan:
        """The plan of an update of a kind."""
        return updates.plan(kind, self.trainer.config.method, self.trainer.schedule)

    def prompts(self) -> list[Prompt]:
        """The prompts of every update."""
        self.trainer.stream.load_state_dict(self._start)
        return [prompt for _, prompt in self.trainer.stream.next(self.trainer.config.method.prompts)]

    def step(self, kind: Kind) -> Step:
        """Take the update with the library; one that reuses sequences, those of the prefix update before it."""
        trainer, seen = self.trainer, []
        if self.plan(kind).reuses:
            if self._kept is None:
                self.step("prefix")
                self._kept = trainer.kept
            trainer.kept = self._kept
        trainer.stream.load_state_dict(self._start)
        trainer.update = 0 if kind == "prefix" else 1
        learn = trainer.learner.learn

        def watched(batch: Batch, *arguments: Any, **options: Any) -> dict[str, Any]:
            seen.append(batch)
            return learn(batch, *arguments, **options)

        trainer.learner.learn = watched  # type: ignore[method-assign]
        try:
            start = now(self.settings.device)
            record = trainer.step()
            seconds = now(self.settings.device) - start
        finally:
            trainer.learner.learn = learn  # type: ignore[method-assign]
        return Step(seconds, dict(record["seconds"]), record, seen[0])

    def naive(self, kind: Kind, batch: Batch) -> Naive:
        """Take the update naively: on advantages and masks of the library's, and its draws of the trained tokens.

        What it draws itself is compared with those: rounding flips a draw now and then.
        """
        trainer, plan, clock = self.trainer, self.plan(kind), Clock(self.settings.device)
        config, policy = trainer.config, trainer.policy
        prompts = self.prompts()
        condition = policy.condition(prompts, trainer.schedule).repeat(plan.pictures)
        with clock.stage("rollout"), trainer.precision(drawing=True):
            seed = (config.run.seed, 0 if kind == "prefix" else 1)
            drawn = draw_from_scratch(policy, condition, plan, config.sampling, seed, config.run.rollout_batch)
        with clock.stage("decode"), trainer.precision(drawing=True):
            parts = [policy.decode(part, trainer.schedule) for part in drawn.split(self.trainer.learner.micro_batch)]
            images = torch.cat([part.float().cpu() for part in parts])
        with clock.stage("reward"):
            trainer.reward(images, [prompt for prompt in prompts for _ in range(plan.pictures)])
        trained = torch.arange(0, len(drawn), plan.continuations)
        span = trainer.schedule.span(plan.steps)
        same = float((drawn[trained][:, span] == batch.sequences.actions[:, span]).float().mean())
        loss, norm = self.naive_learn(kind, batch, drawn, clock)
        return Naive(drawn, clock.seconds, loss, norm, same)

    def learn(self, batch: Batch) -> None:
        """The library's gradient step alone, the reference's pass included."""
        with self.trainer.precision():
            self.trainer.learner.learn(replace(batch, reference_logp_BL=None), self.trainer.stage)

    def naive_learn(
        self, kind: Kind, batch: Batch, finished: Tensor, clock: Clock | None = None
    ) -> tuple[float, float]:
        """The naive gradient step alone: loss and gradient norm.

        Args:
            finished: all sequences; tokens that are trained are taken from ``batch`` instead.
        """
        plan, config, policy = self.plan(kind), self.trainer.config, self.trainer.policy
        known = batch.sequences.actions[:, : self.trainer.schedule.span(plan.steps).stop]
        actions = torch.cat([known, finished[:: plan.continuations, known.shape[1] :]], 1)
        condition = policy.condition(self.prompts(), self.trainer.schedule).repeat(plan.group)
        with self.trainer.precision():
            return learn_naively(
                policy, self.trainer.reference, condition, actions, batch, config.method,
                self.naive_optimizer, self.trainer.learner.micro_batch, clock or Clock(self.settings.device),
            )  # fmt: skip
