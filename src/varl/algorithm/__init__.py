"""The paper (arXiv 2601.02256) as pure functions on tensors: no model, no I/O, no trainer.

One idea a file: ``middle_return`` (VMR), ``advantages`` (GRPO's groups), ``scale_weights`` (PANW),
``mask_propagation`` (MP) and ``loss``.
"""

from varl.algorithm.advantages import AdvantageKind, Advantages, group_advantages
from varl.algorithm.loss import (
    KL,
    KLS,
    KLNeeds,
    LossInput,
    LossOutput,
    Ratio,
    entropy,
    exact_kl,
    kl_k1,
    kl_k2,
    kl_k3,
    policy_loss,
)
from varl.algorithm.mask_propagation import (
    Coverage,
    Empty,
    Merge,
    Propagation,
    RegionShape,
    gradient_mask,
    merge_masks,
    propagate,
    rasterise,
    token_masks,
)
from varl.algorithm.middle_return import ESTIMATORS, Estimator, EstimatorNeeds, middle_return
from varl.algorithm.scale_weights import Count, scale_weights, step_shares, token_weights

__all__ = [
    "ESTIMATORS",
    "KL",
    "KLS",
    "AdvantageKind",
    "Advantages",
    "Count",
    "Coverage",
    "Empty",
    "Estimator",
    "EstimatorNeeds",
    "KLNeeds",
    "LossInput",
    "LossOutput",
    "Merge",
    "Propagation",
    "Ratio",
    "RegionShape",
    "entropy",
    "exact_kl",
    "gradient_mask",
    "group_advantages",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "merge_masks",
    "middle_return",
    "policy_loss",
    "propagate",
    "rasterise",
    "scale_weights",
    "step_shares",
    "token_masks",
    "token_weights",
]
