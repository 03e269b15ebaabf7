"""VAR as a policy: pictures of ImageNet classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from varl.models.coded import CodedPolicy
from varl.models.fields import choose, fill
from varl.models.var.model import GRIDS_256, Transformer, TransformerConfig
from varl.models.vqvae import VQVAE, VQVAEConfig
from varl.policy import Condition, Prompt
from varl.sampling import Sampling
from varl.schedule import ScaleSchedule

__all__ = ["GRIDS", "SIZES", "Var", "VarConfig"]

GRIDS = {
    256: GRIDS_256,
    512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    1024: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}
"""Sides of the grids by resolution in pixels. No weights for 1024 are published."""

SIZES = {f"d{depth}": {"depth": depth} for depth in (16, 20, 24, 30)} | {
    "d36-s": {"depth": 36, "shared_aln": True, "patch_nums": GRIDS[512]}
}
"""The published transformers; all go with the tokenizer's defaults."""


@dataclass(frozen=True)
class VarConfig:
    """The shape of a VAR.

    Attributes:
        transformer, tokenizer: the parts; the tokenizer's grids are the transformer's.
    """

    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    tokenizer: VQVAEConfig = field(default_factory=VQVAEConfig)

    def __post_init__(self) -> None:
        if self.tokenizer.v_patch_nums != self.transformer.patch_nums:
            raise ValueError(
                f"VAR's tokenizer and transformer have different grids, v_patch_nums {self.tokenizer.v_patch_nums} "
                f"and patch_nums {self.transformer.patch_nums}"
            )

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> VarConfig:
        """From a mapping: ``size``, a name of ``SIZES`` (default d16), and fields of ``transformer`` and ``tokenizer``.

        Raises:
            ValueError: for anything unknown.
        """
        given = dict(given or {})
        unknown = sorted(given.keys() - {"size", "transformer", "tokenizer"}, key=str)
        if unknown:
            raise ValueError(f"VAR has no setting {unknown[0]!r}; it has size, transformer, tokenizer")
        size = choose(SIZES, given.get("size", "d16"), "VAR")
        fields = given.get("transformer") or {}
        if isinstance(fields, Mapping):
            fields = {**SIZES[size], **fields}
        transformer = fill(TransformerConfig, fields, "VAR's transformer")
        parts = given.get("tokenizer") or {}
        if isinstance(parts, Mapping):
            parts = {"v_patch_nums": transformer.patch_nums, **parts}
        return cls(transformer, fill(VQVAEConfig, parts, "VAR's tokenizer"))


class Var(CodedPolicy):
    """The class-conditional policy. See ``varl.policy.Policy`` for the contract its methods fulfil."""

    family = "var"
    transformer: Transformer

    def __init__(self, config: VarConfig | None = None) -> None:
        self.config = c = config or VarConfig()
        super().__init__(Transformer(c.transformer, c.tokenizer.vocab_size, c.tokenizer.z_channels), VQVAE(c.tokenizer))

    def condition(self, prompts: Sequence[Prompt], schedule: ScaleSchedule | None = None) -> Condition:
        """The labels of prompts.

        Raises:
            ValueError: if there is no prompt, or one without a label, or with a label that is no class.
        """
        if not prompts:
            raise ValueError("a condition needs at least one prompt")
        labels = torch.tensor([self._label(prompt) for prompt in prompts], device=self.device)
        none = torch.tensor([self.config.transformer.num_classes], device=self.device)
        return Condition(self._check(schedule), {"label": labels}, {"label": none})

    def _label(self, prompt: Prompt) -> int:
        classes = self.config.transformer.num_classes
        if prompt.label is None:
            raise ValueError(f"VAR draws classes: a prompt needs a label, 0 to {classes - 1}; {prompt.text!r} has none")
        if not 0 <= prompt.label < classes:
            raise ValueError(f"VAR's labels are 0 to {classes - 1}; got {prompt.label}")
        return prompt.label

    def generate(
        self,
        condition: Condition,
        sampling: Sampling | None = None,
        generator: torch.Generator | None = None,
        more_smooth: bool = False,
    ) -> torch.Tensor:
        """Pictures [batch, 3, H, W] in [0, 1], as upstream draws them.

        Args:
            condition: [batch] rows.
            sampling: by default unguided and untruncated.
            generator: on the policy's device; by default torch's global one.
            more_smooth: draw mixtures of codes instead of codes: better pictures, which no actions stand for.
        """
        smooth = range(len(condition.schedule)) if more_smooth else range(0)
        return self._generate(condition, sampling or Sampling(), generator, smooth, filtered=True)
