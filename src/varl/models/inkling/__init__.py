"""Inkling, the embedded family: it writes one to three short words into small pictures.

A true next-scale model (multi-scale residual VQ tokenizer and block-causal transformer) whose trained weights come with
the package, so that everything here runs on a laptop.
"""

from varl.models.inkling.checkpoint import load, save
from varl.models.inkling.policy import Inkling, InklingConfig

__all__ = ["Inkling", "InklingConfig", "load", "save"]
