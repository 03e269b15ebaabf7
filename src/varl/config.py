"""The configuration of a training run: typed, complete, and checked before any work starts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from varl.effects import refuse_idle
from varl.method_config import MaskConfig, MethodConfig
from varl.run_config import (
    LARGEST_SPAN,
    EvaluationConfig,
    ParallelConfig,
    RunConfig,
    expand,
    need,
    need_counts,
    need_seeds,
)
from varl.sampling import Sampling

__all__ = [
    "AdapterConfig",
    "EvaluationConfig",
    "MaskConfig",
    "MethodConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PolicyConfig",
    "PromptConfig",
    "RunConfig",
    "TrainConfig",
]


@dataclass(frozen=True)
class AdapterConfig:
    """LoRA: small matrices beside frozen weights are trained instead of the weights.

    Attributes:
        rank: of the matrices; 0 trains the weights themselves.
        alpha: the change is scaled by alpha / rank.
        targets: names of the linear layers that get adapters; by default those that matter, by family.
    """

    rank: int = 0
    alpha: float = 32.0
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        need_counts(self, "rank", section="policy.lora.", least=0)
        need(0 < self.alpha < math.inf, f"policy.lora.alpha must be positive and finite, got {self.alpha}")
        refuse_idle("policy.lora", self, [(self.rank == 0, "with policy.lora.rank 0", ("alpha", "targets"))])


@dataclass(frozen=True)
class PolicyConfig:
    """Which model, and how it computes.

    Attributes:
        family: a model family; ``inkling`` is embedded.
        weights: path of a checkpoint, or a mapping of part name to path; by default the one that comes with the
            package.
        config: the family's own settings, for example its published ``size``.
        resolution: which of the family's resolutions, as the family names them; by default its default.
        aspect_ratio: height over width, where the family has several.
        precision: ``float32``, or ``bfloat16``: compute in bf16 where that is safe, with fp32 weights.
        rollout_precision: the same for drawing and decoding pictures; by default as ``precision``.
        compile: compile the blocks with torch.compile: minutes once, faster after, equal but for rounding.
        checkpointing: keep only the inputs of the blocks for the backward pass, and compute the rest again.
        lora: train adapters instead of the weights.
        adapters: path of adapters that a run wrote, put on the weights. Training goes on with them: ``lora`` is theirs,
            and the reference is the weights without them.
    """

    family: str = "inkling"
    weights: str | dict[str, str] | None = None
    config: dict[str, Any] = field(default_factory=dict)
    resolution: int | str | None = None
    aspect_ratio: float | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    rollout_precision: Literal["float32", "bfloat16"] | None = None
    compile: bool = False
    checkpointing: bool = False
    lora: AdapterConfig = field(default_factory=AdapterConfig)
    adapters: str | None = None

    def __post_init__(self) -> None:
        expand(self, "weights", "adapters", section="policy.")


@dataclass(frozen=True)
class PromptConfig:
    """Which prompts.

    Attributes:
        source: a prompt file (.txt, .jsonl, .csv, .tsv or CVTG-2K's .json); ``inkling:train`` or ``inkling:held-out``,
            generated; or ``labels:0-999``, classes for a class-conditional family.
        count: how many prompts to generate; ignored for files.
        seed: of the generated prompts, and of the order.
        region_counts: share of prompts by their number of text regions, e.g. {2: 0.2, 3: 0.3, 4: 0.3, 5: 0.2}.
    """

    source: str = "inkling:train"
    count: int = 1024
    seed: int = 0
    region_counts: dict[int, float] | None = None

    def __post_init__(self) -> None:
        need_counts(self, "count", section="prompts.")
        need_seeds(self, "seed", section="prompts.")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a linear warm-up.

    Attributes:
        learning_rate: after the warm-up.
        warmup_from: the rate that the warm-up starts at.
        warmup_updates: the warm-up's length; an update counts once, whatever ``method.epochs``.
        suffix_scale: factor on the learning rate of suffix updates; beside prefix updates it needs ``moments`` of
            their own, since shared ones carry most of a suffix gradient into the prefix updates after it.
        betas: decay rates of AdamW's two moments.
        weight_decay: of AdamW, decoupled.
        clip_norm: largest norm of the gradient.
        moments: AdamW's two moments: ``shared`` by all updates, or those of each ``segment``: prefix and suffix updates
            then neither carry on nor scale each other's gradients. Takes the memory of the moments once more.
    """

    learning_rate: float = 1e-5
    warmup_from: float = 1e-6
    warmup_updates: int = 20
    suffix_scale: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    moments: Literal["shared", "segment"] = "shared"

    def __post_init__(self) -> None:
        for name in ("learning_rate", "suffix_scale"):
            value = getattr(self, name)
            need(0 < value < math.inf, f"optimizer.{name} must be positive and finite, got {value}")
        for name in ("warmup_from", "weight_decay"):
            value = getattr(self, name)
            need(0 <= value < math.inf, f"optimizer.{name} must be 0 or more, and finite, got {value}")
        need(all(0 <= b < 1 for b in self.betas), f"optimizer.betas must be in [0, 1), got {self.betas}")
        need(self.clip_norm > 0, f"optimizer.clip_norm must be positive, got {self.clip_norm}")
        need_counts(self, "warmup_updates", section="optimizer.", least=0, most=LARGEST_SPAN)
        refuse_idle(
            "optimizer",
            self,
            [
                (self.warmup_updates == 0, "with optimizer.warmup_updates 0", ("warmup_from",)),
                (self.warmup_from > self.learning_rate, "above optimizer.learning_rate", ("warmup_from",)),
            ],
        )


@dataclass(frozen=True)
class TrainConfig:
    """Everything that ``varl train`` needs.

    Attributes:
        policy: which model.
        prompts: which prompts.
        sampling: how pictures are drawn, in training and, if that asks for nothing else, in evaluation.
        method: what is sampled, rewarded and trained.
        optimizer: AdamW, and its warm-up.
        evaluation: on held-out prompts.
        run: how long, where and how.
        parallel: how several processes share the work.
        reward: ``ocr``, ``my_module:my_reward``, or a mapping with ``name`` and the reward's options.
    """

    policy: PolicyConfig = field(default_factory=PolicyConfig)
    prompts: PromptConfig = field(default_factory=PromptConfig)
    reward: str | dict[str, Any] = "ocr"
    sampling: Sampling = field(default_factory=Sampling)
    method: MethodConfig = field(default_factory=MethodConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    run: RunConfig = field(default_factory=RunConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        computed = {self.policy.precision, self.policy.rollout_precision or self.policy.precision}
        need(
            self.parallel.param_dtype == "float32" or computed == {"bfloat16"},
            "parallel.param_dtype bfloat16 needs policy.precision bfloat16, in rollouts too",
        )
        self._refuse_idle()

    def _refuse_idle(self) -> None:
        """Refuse settings of one section that have no effect beside those of another."""
        method, optimizer, kind = self.method, self.optimizer, f"with method.update {self.method.update}"
        plain = method.logp == "sampling" and self.sampling.is_plain
        refuse_idle("method", method, [(plain, "where sampling is the policy's own distribution", ("logp",))])
        need(
            method.logp == "policy" or self.sampling.top_k != 1,
            "method.logp sampling needs a sampling.top_k other than 1, where every log-probability is 0",
        )
        evaluations = 2 + ((self.run.updates - 1) // self.evaluation.every if self.evaluation.every else 0)
        few = self.evaluation.alarm_window > evaluations
        refuse_idle(
            "evaluation",
            self.evaluation,
            [(few, f"with {evaluations} evaluations in all", ("alarm_window", "alarm_stops"))],
        )
        refuse_idle(
            "optimizer",
            optimizer,
            [
                (not method.has_suffix, kind, ("suffix_scale",)),
                (method.update != "alternate", kind, ("moments",)),
            ],
        )
        need(
            optimizer.suffix_scale == 1 or optimizer.moments == "segment" or method.update == "suffix",
            f"optimizer.suffix_scale {optimizer.suffix_scale} needs optimizer.moments segment: shared moments carry "
            "most of a suffix gradient into the prefix updates after it, at their rate",
        )
