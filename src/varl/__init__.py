"""varl: reinforcement learning for visual autoregressive (next-scale) image generators."""

from varl.models import load_policy
from varl.policy import Condition, Policy, Prompt
from varl.rollout import Rollout, rollout
from varl.sampling import Sampling
from varl.schedule import ScaleSchedule
from varl.scoring import Scores, log_probs

__all__ = [
    "Condition",
    "Policy",
    "Prompt",
    "Rollout",
    "Sampling",
    "ScaleSchedule",
    "Scores",
    "load_policy",
    "log_probs",
    "rollout",
]
__version__ = "0.1.0"
