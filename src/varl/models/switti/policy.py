"""Switti as a policy: pictures of texts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from varl.models.blocks import Cache
from varl.models.coded import CodedPolicy
from varl.models.fields import choose, fill
from varl.models.switti.condition import CROP, TextEncoders
from varl.models.switti.model import GRIDS_512, Transformer, TransformerConfig
from varl.models.vqvae import VQVAE, VQVAEConfig
from varl.policy import Condition, Prompt
from varl.sampling import Sampling
from varl.schedule import ScaleSchedule

__all__ = ["GRIDS", "SIZES", "Switti", "SwittiConfig"]

GRIDS = {512: GRIDS_512, 1024: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)}
"""Sides of the grids by resolution in pixels."""

SIZES: dict[str, dict[str, Any]] = {
    "512": {"patch_nums": GRIDS[512], "use_ar": False},
    "512-ar": {"patch_nums": GRIDS[512], "use_ar": True},
    "1024": {"patch_nums": GRIDS[1024], "use_ar": False},
    "1024-ar": {"patch_nums": GRIDS[1024], "use_ar": True},
}
"""The published transformers (Switti, Switti-AR, Switti-1024, Switti-1024-AR); all go with one tokenizer."""

OPTIONS = ("turn_on_cfg_start_si", "turn_off_cfg_start_si", "last_scale_temp")


@dataclass(frozen=True)
class SwittiConfig:
    """The shape of a Switti, and how it is sampled.

    Attributes:
        transformer, tokenizer: the parts.
        turn_on_cfg_start_si: the first step that is guided.
        turn_off_cfg_start_si: the first step that is not guided any more; none is if there are fewer steps.
        last_scale_temp: a temperature that divides the logits of all steps from ``turn_off_cfg_start_si`` on. It is
            part of the policy: sequences are drawn, and scored, under it.
    """

    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    tokenizer: VQVAEConfig = field(default_factory=lambda: VQVAEConfig(v_patch_nums=GRIDS_512))
    turn_on_cfg_start_si: int = 0
    turn_off_cfg_start_si: int = 10
    last_scale_temp: float | None = None

    def __post_init__(self) -> None:
        for ours, theirs in (("patch_nums", "v_patch_nums"), ("V", "vocab_size"), ("Cvae", "z_channels")):
            values = getattr(self.transformer, ours), getattr(self.tokenizer, theirs)
            if values[0] != values[1]:
                raise ValueError(
                    f"Switti's transformer and tokenizer differ: {ours} is {values[0]}, {theirs} is {values[1]}"
                )
        if self.last_scale_temp is not None and not 0 < self.last_scale_temp < math.inf:
            raise ValueError(f"Switti's last_scale_temp must be positive, got {self.last_scale_temp}")
        if self.turn_on_cfg_start_si < 0 or self.turn_off_cfg_start_si < 0:
            raise ValueError("Switti's turn_on_cfg_start_si and turn_off_cfg_start_si are steps, counted from 0")

    @classmethod
    def of(cls, given: Mapping[str, Any] | None, saved: Mapping[str, Any] | None = None) -> SwittiConfig:
        """From a mapping: ``size``, a name of ``SIZES`` (default 512), fields of ``transformer`` and ``tokenizer``, and
        the sampling options.

        Both parts take ``reso``, a resolution of ``GRIDS``, in place of the grids' sides.

        Args:
            saved: the transformer's fields as its checkpoint names them; ``given`` goes before them, ``size`` behind.

        Raises:
            ValueError: for anything unknown.
        """
        given = dict(given or {})
        known = ("size", "transformer", "tokenizer", *OPTIONS)
        unknown = sorted(given.keys() - set(known), key=str)
        if unknown:
            raise ValueError(f"Switti has no setting {unknown[0]!r}; it has {', '.join(known)}")
        size = choose(SIZES, given.get("size", "512"), "Switti")
        fields = given.get("transformer") or {}
        if isinstance(fields, Mapping):
            fields = {**SIZES[size], **_grids(saved or {}, "patch_nums"), **_grids(fields, "patch_nums")}
        transformer = fill(TransformerConfig, fields, "Switti's transformer")
        own = {"v_patch_nums": transformer.patch_nums, "vocab_size": transformer.V, "z_channels": transformer.Cvae}
        parts = given.get("tokenizer") or {}
        if isinstance(parts, Mapping):
            parts = {**own, **_grids(parts, "v_patch_nums")}
        options = {name: given[name] for name in OPTIONS if name in given}
        tokenizer = fill(VQVAEConfig, parts, "Switti's tokenizer")
        return fill(cls, {"transformer": transformer, "tokenizer": tokenizer, **options}, "Switti")


def _grids(fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Fields with the grids' sides as numbers, which may be named by ``reso`` or written ``1_2_3``."""
    fields = dict(fields)
    reso = fields.pop("reso", None)
    if reso is not None and name not in fields:
        if not isinstance(reso, int) or reso not in GRIDS:
            raise ValueError(f"Switti has no grids for reso {reso!r}; there are {', '.join(map(str, GRIDS))}")
        fields[name] = GRIDS[reso]
    if isinstance(fields.get(name), str):
        fields[name] = tuple(int(side) for side in fields[name].split("_"))
    return fields


class Switti(CodedPolicy):
    """The text-to-image policy. See ``varl.policy.Policy`` for the contract its methods fulfil.

    Args:
        encoders: encode prompts; without them there is only ``condition_from``.
    """

    family = "switti"
    transformer: Transformer

    def __init__(self, config: SwittiConfig | None = None, encoders: TextEncoders | None = None) -> None:
        self.config = c = config or SwittiConfig()
        super().__init__(Transformer(c.transformer), VQVAE(c.tokenizer))
        self.encoders = encoders
        self.shares_keys = c.transformer.use_ar

    def guidance_ramp(self, schedule: ScaleSchedule) -> list[float]:
        """Guidance grows linearly from step to step, and is nothing where it is switched off."""
        c = self.config
        on = range(c.turn_on_cfg_start_si, c.turn_off_cfg_start_si)
        return [value if step in on else 0.0 for step, value in enumerate(super().guidance_ramp(schedule))]

    def condition(self, prompts: Sequence[Prompt], schedule: ScaleSchedule | None = None) -> Condition:
        """Encode the texts of prompts, each distinct one once.

        Raises:
            ValueError: if there is no prompt, or the policy has no text encoders.
            ImportError: if transformers is missing.
        """
        if not prompts:
            raise ValueError("a condition needs at least one prompt")
        if self.encoders is None:
            raise ValueError(
                "this Switti has no text encoders: load it with weights for text_encoder and text_encoder_2, or give "
                "precomputed features to condition_from"
            )
        encoded = self.encoders(["", *(prompt.text for prompt in prompts)], self.device)
        null = {f"null_{name}": value[:1] for name, value in encoded.items()}
        return self.condition_from({name: value[1:] for name, value in encoded.items()} | null, schedule)

    def text_tokens(self, text: str) -> tuple[int, int] | None:
        """The tokens of a text, and how many of them a condition holds; None if the text encoders do not count."""
        count = getattr(self.encoders, "count", None)
        return None if count is None else count(text)

    def condition_from(self, features: Mapping[str, Tensor], schedule: ScaleSchedule | None = None) -> Condition:
        """A condition from precomputed features.

        Args:
            features: ``prompt_embeds`` [B, T, E], the last states of both encoders side by side; ``pooled`` [B, P] of
                the second; ``attn_bias`` [B, T], 0 for tokens and -inf for padding; for guidance the same of the empty
                text as ``null_prompt_embeds`` and so on, [1, ...] or equal rows; and maybe ``crop``, whole numbers
                [B, 4] as ``crop_values`` makes them, by default those that pictures are drawn with.

        Raises:
            ValueError: if some are missing, unknown, or of another shape.
        """
        c = self.config.transformer
        names = ("prompt_embeds", "pooled", "attn_bias")
        unknown = features.keys() - {*names, *(f"null_{name}" for name in names), "crop"}
        missing = [name for name in names if name not in features]
        given_null = [name for name in names if f"null_{name}" in features]
        if unknown or missing or len(given_null) not in (0, len(names)):
            raise ValueError(
                f"Switti's features are {', '.join(names)}, null_ and each of them, and crop; got {sorted(features)}"
            )
        batch, tokens = features["attn_bias"].shape
        shapes = {"prompt_embeds": (tokens, c.context_dim), "pooled": (c.pooled_dim,), "attn_bias": (tokens,)}
        for name in (*names, *(f"null_{name}" for name in given_null)):
            expected = (*features[name].shape[:1], *shapes[name.removeprefix("null_")])
            if tuple(features[name].shape) != expected or (name in names and len(features[name]) != batch):
                sizes = ", ".join(map(str, expected[1:]))
                raise ValueError(f"Switti's {name} must be [batch, {sizes}], not {[*features[name].shape]}")
        rows = {name: features[name].to(self.device) for name in names}
        null = {name: features[f"null_{name}"].to(self.device) for name in given_null}
        for name, value in null.items():
            if not torch.equal(value, value[:1].expand_as(value)):
                raise ValueError(f"Switti's null_{name} must be of one text; its rows differ")
        null = {name: value[:1] for name, value in null.items()}
        if c.use_crop_cond:
            crop = torch.tensor([CROP], device=self.device)
            rows["crop"] = features.get("crop", crop.expand(batch, -1)).to(self.device)
            null |= {"crop": crop} if null else {}
        return Condition(self._check(schedule), rows, null)

    def _hidden(
        self, condition: Mapping[str, Tensor], inputs: list[Tensor], steps: range, cache: Cache | None
    ) -> Tensor:
        """With ``last_scale_temp``, one more channel says where it holds: 1 there, 0 elsewhere."""
        x = super()._hidden(condition, inputs, steps, cache)
        if self.config.last_scale_temp is None:
            return x
        counts = self.default_schedule.counts
        late = [float(step >= self.config.turn_off_cfg_start_si) for step in steps for _ in range(counts[step])]
        return torch.cat([x, x.new_tensor(late).view(1, -1, 1).expand(len(x), -1, -1)], -1)

    def logits(self, hidden: Tensor) -> Tensor:
        """The head: [..., width] -> [..., classes], in fp32, tempered where ``last_scale_temp`` says so."""
        if self.config.last_scale_temp is None:
            return super().logits(hidden)
        logits, late = super().logits(hidden[..., :-1]), hidden[..., -1:] > 0
        return torch.where(late, logits / self.config.last_scale_temp, logits)

    def generate(
        self,
        condition: Condition,
        sampling: Sampling | None = None,
        generator: torch.Generator | None = None,
        more_smooth: bool = False,
        smooth_start_si: int = 0,
    ) -> Tensor:
        """Pictures [batch, 3, H, W] in [0, 1], as upstream draws them.

        Args:
            condition: [batch] rows.
            sampling: by default unguided and untruncated.
            generator: on the policy's device; by default torch's global one.
            more_smooth: draw mixtures of codes instead of codes, untruncated: better pictures, which no actions stand
                for.
            smooth_start_si: the first step to do so; the last is the one before ``turn_off_cfg_start_si``.
        """
        smooth = range(smooth_start_si, self.config.turn_off_cfg_start_si) if more_smooth else range(0)
        return self._generate(condition, sampling or Sampling(), generator, smooth, filtered=False)
