"""Infinity: text to picture by next-scale prediction of bits (Han et al., arXiv 2412.04431).

Weights of FoundationVision/Infinity load as they are; none come with the package.
"""

from varl.models.infinity.checkpoint import load, save
from varl.models.infinity.config import InfinityConfig, TokenizerConfig, TransformerConfig
from varl.models.infinity.policy import Infinity

__all__ = ["Infinity", "InfinityConfig", "TokenizerConfig", "TransformerConfig", "load", "save"]
