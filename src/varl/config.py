"""The configuration of a training run: typed, complete, and checked before any work starts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from varl.algorithm import (
    ESTIMATORS,
    KL,
    AdvantageKind,
    Count,
    Coverage,
    Empty,
    Estimator,
    Merge,
    Propagation,
    Ratio,
    RegionShape,
)
from varl.effects import Rule, refuse_idle
from varl.run_config import EvaluationConfig, ParallelConfig, RunConfig, expand, need, need_counts, need_seeds
from varl.sampling import Sampling
from varl.schedule import MiddleStep

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
        need(self.rank >= 0, f"policy.lora.rank must be 0 (off) or more, got {self.rank}")
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
        expand(self, "weights", "adapters")


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
class MaskConfig:
    """Mask propagation (paper, section 3.5).

    Attributes:
        enabled: restrict the policy term to tokens that the reward's regions trace back to.
        propagation: from grid to grid, fine to coarse, or straight from the picture at every scale.
        empty: what a picture without regions trains: everything, or nothing.
        merge: how the masks of a prefix's continuations are joined.
        coverage: a cell of the final grid is masked if a region overlaps it, or softly, by the share that is covered.
        shape: regions as polygons, or as the boxes around them.
        dilation: pixels by which regions are widened first.
        count: tokens that the step weights count: the whole grid's, or only masked ones.
        kl: restrict the KL term too.
    """

    enabled: bool = True
    propagation: Propagation = "sequential"
    empty: Empty = "ones"
    merge: Merge = "union"
    coverage: Coverage = "overlap"
    shape: RegionShape = "polygon"
    dilation: float = 0.0
    count: Count = "grid"
    kl: bool = False

    def __post_init__(self) -> None:
        need(0 <= self.dilation < math.inf, f"method.mask.dilation must be 0 or more pixels, got {self.dilation}")
        others = ("propagation", "empty", "merge", "coverage", "shape", "dilation", "count", "kl")
        refuse_idle("method.mask", self, [(not self.enabled, "with method.mask.enabled false", others)])


@dataclass(frozen=True)
class MethodConfig:
    """What is sampled, what is rewarded, and which steps are trained.

    Attributes:
        update: ``alternate`` between prefix and suffix updates (the paper's method), or always ``full`` (vanilla GRPO),
            ``prefix`` or ``suffix``.
        prefix_updates: n of the alternation n : m, prefix updates in a row.
        suffix_updates: m of the alternation n : m, suffix updates in a row.
        middle: the middle step: ``quarter``, ``grid:S``, ``pixels:P`` or a number of steps.
        prompts: prompts an update.
        group: samples a prompt, compared with one another.
        continuations: K, continuations drawn from every prefix of a prefix update.
        value: estimator of the middle return; ``soft`` is the paper's. With K = 1 ``soft``, ``mean`` and ``max`` are
            the terminal reward; ``policy`` and ``soft-reference`` need a reference, and are then the reward less eta
            times the log-ratio of the suffix, under the distribution that it was drawn from.
        eta: temperature of the middle return. For ``policy`` it prices the log-ratio of a whole suffix: set it to
            ``beta``, or it drowns the reward.
        continuations_by: who draws the continuations of a prefix update: the ``policy`` (the paper's way), or the
            ``reference``, whose log-mean-exp is the soft value of the paper's Definition 1.
        value_at: the step that prefixes are valued at: ``end``, or one named as the middle step is, where continuations
            stop and their pictures are decoded from what is there: cheaper, and another number. The middle step itself
            values the picture of the prefix alone, with ``continuations`` 1.
        suffix_state: one prefix ``shared`` by a suffix group, an ``independent`` one for each sample, or ``reused``:
            the continuations of the prefix update before, each prefix's a group of its own. That draws and scores
            nothing, from a policy one step old whose ratio is taken to be 1.
        prefix_gradient: a shared prefix is computed once; its keys and values pass gradients on to the weights, so that
            the update is exact. False stops them there in every suffix update: an approximation that spares the
            prefix's backward pass.
        advantage: how rewards of a group become advantages.
        alpha: exponent of the step weights k_t = 1 / n_t^alpha.
        rescale: divide by the sum of k_t n_t, so that alpha does not change the learning rate.
        mask: mask propagation.
        clip: of the probability ratio, 1 - clip to 1 + clip.
        epochs: optimizer steps on every batch of samples.
        beta: weight of the KL to the initial policy; 0 holds no reference.
        kl: estimator of that KL.
        ratio: probability ratio of a token, or the geometric mean over a step.
        logp: log-probabilities under the ``policy``'s own distribution (the paper's way), or the ``sampling`` one,
            which costs a second pass where rollouts are guided, and is then the safer one at high learning rates
            (docs/performance.md).
        zero_variance: a group whose returns are all equal teaches nothing: ``drop`` leaves it out; ``kl`` keeps its KL,
            which then moves the weights even where no group of an update has variance.
    """

    update: Literal["alternate", "full", "prefix", "suffix"] = "alternate"
    prefix_updates: int = 3
    suffix_updates: int = 1
    middle: MiddleStep = "quarter"
    prompts: int = 4
    group: int = 8
    continuations: int = 2
    value: Estimator = "soft"
    eta: float = 1.0
    continuations_by: Literal["policy", "reference"] = "policy"
    value_at: MiddleStep = "end"
    suffix_state: Literal["shared", "independent", "reused"] = "shared"
    prefix_gradient: bool = True
    advantage: AdvantageKind = "std"
    alpha: float = 0.6
    rescale: bool = True
    mask: MaskConfig = field(default_factory=MaskConfig)
    clip: float = 0.2
    epochs: int = 1
    beta: float = 0.01
    kl: KL = "k3"
    ratio: Ratio = "token"
    logp: Literal["policy", "sampling"] = "policy"
    zero_variance: Literal["drop", "kl"] = "drop"

    def __post_init__(self) -> None:
        for name in ("prompts", "continuations", "epochs", "prefix_updates", "suffix_updates"):
            need(getattr(self, name) > 0, f"method.{name} must be positive, got {getattr(self, name)}")
        need(self.group > 1, f"method.group must be at least 2 to compare samples, got {self.group}")
        need(math.isfinite(self.alpha), f"method.alpha must be a finite number, got {self.alpha}")
        need(self.eta >= 0, f"method.eta must be 0 or more, got {self.eta}")
        need(0 <= self.beta < math.inf, f"method.beta must be 0 or more, and finite, got {self.beta}")
        need(self.clip > 0, f"method.clip must be positive, got {self.clip}")
        need(
            self.continuations_by == "policy" or not ESTIMATORS[self.value].log_ratio,
            f"method.value {self.value} weighs continuations of the policy; with continuations_by reference use soft",
        )
        self._check_eta()
        if self.suffix_state == "reused":
            self._check_reuse()
        refuse_idle("method", self, self._idle())
        alone = not self.has_prefix or self.continuations == 1
        refuse_idle(
            "method.mask",
            self.mask,
            [
                (self.beta == 0, "with method.beta 0", ("kl",)),
                (alone, "where a sequence is valued by one picture", ("merge",)),
                (self.alpha == 0 and not self.rescale, "with method.alpha 0 and method.rescale false", ("count",)),
            ],
        )

    def _idle(self) -> list[Rule]:
        """Which settings have no effect beside which others."""
        kind, one = f"with method.update {self.update}", self.continuations == 1
        needs = ESTIMATORS[self.value]
        return [
            (self.update != "alternate", kind, ("prefix_updates", "suffix_updates")),
            (self.update == "full", kind, ("middle",)),
            (not self.has_prefix, kind, ("continuations", "value", "eta", "continuations_by", "value_at")),
            (not self.has_suffix, kind, ("suffix_state", "prefix_gradient")),
            (one and not needs.log_ratio, "with method.continuations 1, whose reward is the value", ("value", "eta")),
            (not needs.eta, f"with method.value {self.value}", ("eta",)),
            (self.beta == 0, "with method.beta 0", ("kl", "zero_variance")),
            (self.epochs == 1, "with method.epochs 1, where every ratio is 1", ("clip", "ratio")),
        ]

    def _check_eta(self) -> None:
        """Refuse temperatures at which an estimator of log-ratios has no limit, or is one that needs none."""
        if not self.has_prefix or not ESTIMATORS[self.value].log_ratio:
            return
        # One continuation is not weighed against others: the log-ratio is then added, as ``policy`` adds it.
        need(
            self.eta < math.inf or (self.value != "policy" and self.continuations > 1),
            f"method.value {self.value} needs a finite method.eta here; the mean of the rewards is method.value mean",
        )
        same = "mean" if self.value == "policy" else "max"
        need(
            self.eta > 0,
            f"method.value {self.value} with method.eta 0 is method.value {same}, which needs no reference: name that",
        )

    @property
    def has_prefix(self) -> bool:
        """Whether there are prefix updates."""
        return self.update in ("alternate", "prefix")

    @property
    def has_suffix(self) -> bool:
        """Whether there are suffix updates."""
        return self.update in ("alternate", "suffix")

    def _check_reuse(self) -> None:
        need(self.update == "alternate", "method.suffix_state reused needs prefix updates: method.update alternate")
        need(self.suffix_updates == 1, "method.suffix_state reused has pictures for one suffix update in a row only")
        need(
            self.continuations > 1, "method.suffix_state reused compares continuations: method.continuations 2 or more"
        )
        whole = self.value_at == "end" and self.continuations_by == "policy"
        need(
            whole,
            "method.suffix_state reused needs whole pictures by the policy: value_at end, continuations_by policy",
        )

    @property
    def needs_reference(self) -> bool:
        """Whether a frozen copy of the initial policy must be held."""
        return self.beta > 0 or ESTIMATORS[self.value].log_ratio or self.continuations_by == "reference"


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a linear warm-up.

    Attributes:
        learning_rate: after the warm-up.
        warmup_from: the rate that the warm-up starts at.
        warmup_updates: the warm-up's length.
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
        need(self.warmup_updates >= 0, f"optimizer.warmup_updates must be 0 or more, got {self.warmup_updates}")
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
