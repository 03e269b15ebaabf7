"""VAR (Tian et al., arXiv 2404.02905): class-conditional next-scale prediction, weights of FoundationVision/VAR."""

from varl.models.var.checkpoint import load, save
from varl.models.var.policy import Var, VarConfig

__all__ = ["Var", "VarConfig", "load", "save"]
