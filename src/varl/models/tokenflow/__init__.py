"""TokenFlow-T2I (arXiv 2412.03069): a Llama that draws 256-pixel pictures grid by grid, in codes of two codebooks."""

from varl.models.tokenflow.checkpoint import load, save
from varl.models.tokenflow.config import TokenFlowConfig, TokenizerConfig, TransformerConfig
from varl.models.tokenflow.policy import TokenFlow

__all__ = ["TokenFlow", "TokenFlowConfig", "TokenizerConfig", "TransformerConfig", "load", "save"]
