"""The configuration of the method: what is sampled, what is rewarded, and which steps are trained."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

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
from varl.run_config import LARGEST_COUNT, need, need_counts
from varl.schedule import MiddleStep

__all__ = ["MaskConfig", "MethodConfig"]


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
        counts = ("prompts", "group", "continuations", "epochs", "prefix_updates", "suffix_updates")
        need_counts(self, *counts, section="method.")
        pictures, product = self.prompts * self.group * self.continuations, "prompts x group x continuations of method"
        need(pictures <= LARGEST_COUNT, f"{product} must be at most {LARGEST_COUNT} pictures, got {pictures}")
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
