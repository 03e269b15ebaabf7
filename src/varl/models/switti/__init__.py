"""Switti (Voronov et al., arXiv 2412.01819): text to image, scale by scale, weights of yandex-research/switti."""

from varl.models.switti.checkpoint import load, save
from varl.models.switti.condition import crop_values
from varl.models.switti.policy import Switti, SwittiConfig

__all__ = ["Switti", "SwittiConfig", "crop_values", "load", "save"]
