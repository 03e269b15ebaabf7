"""Infinity as a policy: text to picture, in bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from varl.models.blocks import Cache
from varl.models.forcing import TeacherForced
from varl.models.infinity.bits import BitQuantizer, Corrupt
from varl.models.infinity.condition import Features, TextEncoder, make_condition, split_features
from varl.models.infinity.config import InfinityConfig
from varl.models.infinity.model import After, Transformer
from varl.models.infinity.schedules import grids
from varl.models.infinity.tokenizer import Tokenizer
from varl.models.state import DrawState
from varl.policy import Condition, Prompt
from varl.sampling import Sampling, draw, filter_logits
from varl.schedule import ScaleSchedule
from varl.transfer import sent

__all__ = ["Infinity"]


class Infinity(TeacherForced):
    """The bitwise next-scale policy. See ``varl.policy.Policy`` for the contract its methods fulfil.

    Args:
        config: its shape.
        transformer: of that shape.
        tokenizer: also; without one, pictures can be neither made nor read.
        text_encoder: what turns prompts into features; without one, conditions are made by ``condition_from``.
    """

    family = "infinity"
    classes = 2
    lora_targets = ("sa.mat_qkv", "sa.proj", "ca.mat_q", "ca.mat_kv", "ca.proj", "ffn.fc1", "ffn.fc2")

    def __init__(
        self,
        config: InfinityConfig,
        transformer: Transformer,
        tokenizer: Tokenizer | None = None,
        text_encoder: TextEncoder | None = None,
    ) -> None:
        super().__init__()
        self.config, self.text_encoder = config, text_encoder
        self.event: tuple[int, ...] = (config.bits,)
        self.quantizer = BitQuantizer(config.tokenizer.codebook_dim, config.apply_spatial_patchify)
        self.transformer, self.tokenizer = transformer, tokenizer

    @property
    def default_schedule(self) -> ScaleSchedule:
        return self.config.schedule

    @property
    def trainable(self) -> nn.Module:
        """The part that reinforcement learning tunes; the tokenizer stays frozen."""
        return self.transformer

    def schedules(self, resolution: int | str | None = None, aspect_ratio: float | None = None) -> ScaleSchedule:
        """A schedule of upstream's table.

        Args:
            resolution: ``"0.06M"``, ``"0.25M"``, ``"0.60M"``, ``"1M"``, or the side in pixels of the square one.
            aspect_ratio: height / width; the nearest of the table is taken.

        Raises:
            ValueError: if there is no such resolution.
        """
        if resolution is None and aspect_ratio is None:
            return self.default_schedule
        asked = self.config.pn if resolution is None else resolution
        ratio = self.config.h_div_w if aspect_ratio is None else aspect_ratio
        return ScaleSchedule(grids(asked, ratio), self.config.stride)

    def guidance_ramp(self, schedule: ScaleSchedule) -> list[float]:
        """1 at every step, the first included; with ``cfg_list``, what each of its entries adds to 1."""
        if self.config.cfg_list is None:
            return [1.0] * len(schedule)
        return [cfg - 1 for cfg in _entries(self.config.cfg_list, schedule, "cfg_list")]

    def condition(
        self,
        prompts: Sequence[Prompt],
        schedule: ScaleSchedule | None = None,
        negative: Sequence[Prompt] | None = None,
    ) -> Condition:
        """Encode prompts; ``negative`` ones (one a row, or one for all) replace the learned unconditional text.

        Raises:
            ValueError: if there is no prompt, or the policy has no text encoder.
            ImportError: if transformers is missing.
        """
        if not prompts:
            raise ValueError("a condition needs at least one prompt")
        if self.text_encoder is None:
            raise ValueError(
                "this Infinity has no text encoder: load it with weights={'text_encoder': folder of flan-t5-xl, ...}, "
                "or give precomputed features to policy.condition_from"
            )
        texts = [[p.text for p in given] for given in (prompts, negative or [])]
        encoded = [self.text_encoder(given, self._device) for given in texts]
        return self.condition_from(encoded[0], schedule, encoded[1] or None)

    def text_tokens(self, text: str) -> tuple[int, int] | None:
        """The tokens of a text, and how many of them a condition holds; None if the text encoder does not count."""
        count = getattr(self.text_encoder, "count", None)
        return None if count is None else count(text)

    def condition_from(
        self, features: Features, schedule: ScaleSchedule | None = None, negative: Features | None = None
    ) -> Condition:
        """A condition from the text encoder's features: see ``condition.split_features`` for their forms."""
        schedule = schedule or self.default_schedule
        if schedule.grids[0] != (1, 1):
            raise ValueError(f"Infinity's first grid is one token, not {schedule.grids[0]}")
        shape = self.config.transformer
        rows = [split_features(features), None if negative is None else split_features(negative)]
        return make_condition(rows[0] or [], rows[1], schedule, shape.text_maxlen, shape.text_channels, self._device)

    @property
    def _device(self) -> torch.device:
        return self.transformer.pos_start.device

    @torch.no_grad()
    def start(self, condition: Condition, guidance: float = 0.0) -> DrawState:
        """An empty sequence; ``guidance`` is that of ``Sampling``: upstream's cfg less 1."""
        schedule, batch = condition.schedule, condition.batch
        passes = [self.transformer.read(condition.features)]
        if guidance > 0:
            null = {name: value.expand(batch, *value.shape[1:]) for name, value in condition.null.items()}
            passes.append(self.transformer.read(null))
        rows = {name: torch.cat([one[name] for one in passes]) for name in passes[0]}
        cache = self.transformer.new_cache(schedule.tokens)
        drawn = {"total": self.quantizer.empty(batch, schedule, self._device)}
        return DrawState(schedule, rows, drawn, cache, len(passes), guidance)

    @torch.no_grad()
    def next_logits(self, state: DrawState) -> Tensor:
        """Logits of the next grid, fp32 [batch, tokens, bits, 2], guided as the state asks."""
        cfg = 1 + state.guidance * self.guidance_ramp(state.schedule)[state.step] if state.copies == 2 else 1.0
        return self.guided_logits(state, cfg, self._tau(state.schedule, state.step))

    @torch.no_grad()
    def guided_logits(self, state: DrawState, cfg: float, tau: float, insertion: Sequence[int] = (0,)) -> Tensor:
        """Logits of the next grid, mixed as cfg * conditional + (1 - cfg) * unconditional and divided by tau.

        Args:
            state: with both halves, unless cfg is 1.
            insertion: where to mix: 0 the logits; -n the output of the n-th block from the end, for both halves.
        """
        step, batch = state.step, state.batch

        def mixed(x: Tensor) -> Tensor:
            return cfg * x[:batch] + (1 - cfg) * x[batch:]

        layers = {self.config.transformer.depth + place for place in insertion if place < 0}
        after: After | None = None
        if layers and cfg != 1:

            def after(layer: int, x: Tensor) -> Tensor:
                return mixed(x).repeat(2, 1, 1) if layer in layers else x

        inputs = []
        if step > 0:
            now = self.quantizer.input(state.drawn["total"], state.schedule, step)
            inputs = [now.repeat(state.copies, 1, 1)]
        hidden = self.transformer(state.passes, inputs, state.schedule, range(step, step + 1), state.cache, after)
        on_logits = cfg != 1 and 0 in insertion
        logits = self.logits(hidden if on_logits else hidden[:batch])
        return (mixed(logits) if on_logits else logits) / tau

    @torch.no_grad()
    def advance(self, state: DrawState, actions: Tensor) -> None:
        """Consume the grid that was drawn, [batch, tokens, bits]; ``next_logits`` must have been called."""
        state.drawn["total"] = state.drawn["total"] + self.quantizer.contribution(actions, state.schedule, state.step)
        state.step += 1

    @torch.no_grad()
    def generate(
        self,
        condition: Condition,
        sampling: Sampling | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        *,
        cfg_list: Sequence[float] | float | None = None,
        tau_list: Sequence[float] | float | None = None,
        cfg_insertion_layer: Sequence[int] = (0,),
    ) -> Tensor:
        """Draw whole sequences with upstream's switches, for pictures: nothing is returned that could be trained on.

        Args:
            cfg_list, tau_list: guidance (1 is off) and divisor of the logits, one number or one a scale; by default
                those of ``sampling`` and of the configuration.
            cfg_insertion_layer: where guidance acts: 0 the logits, -n the output of the n-th block from the end.

        Returns:
            actions [batch, tokens, bits].
        """
        sampling = sampling or Sampling()
        schedule, depth = condition.schedule, self.config.transformer.depth
        if not cfg_insertion_layer or any(not -depth < place <= 0 for place in cfg_insertion_layer):
            raise ValueError(f"cfg_insertion_layer holds 0 or -1 to -{depth - 1}, got {list(cfg_insertion_layer)}")
        steps = range(len(schedule))
        if cfg_list is None:
            cfgs = [1 + sampling.guidance * ramp for ramp in self.guidance_ramp(schedule)]
        else:
            cfgs = _entries(cfg_list, schedule, "cfg_list")
        if tau_list is None:
            taus = [sampling.temperature * self._tau(schedule, step) for step in steps]
        else:
            taus = _entries(tau_list, schedule, "tau_list")
        kept = replace(sampling, temperature=1.0, top_k=min(sampling.top_k, self.classes))
        state, drawn = self.start(condition, float(any(cfg != 1 for cfg in cfgs))), []
        for step in steps:
            logits = self.guided_logits(state, cfgs[step], taus[step], cfg_insertion_layer)
            drawn.append(draw(filter_logits(logits, kept), generator))
            self.advance(state, drawn[-1])
        return torch.cat(drawn, 1)

    def features(self, condition: Condition, actions: Tensor, steps: range, cache: Cache | None) -> Tensor:
        """See ``TeacherForced``; with ``tau_list`` a last channel holds each token's 1 / tau."""
        schedule = condition.schedule
        known = actions[:, : schedule.offsets[steps.stop - 1]]
        with torch.no_grad():
            inputs = self.quantizer.accumulate(known, schedule, steps.stop)[1][max(steps.start - 1, 0) :]
        x = self.transformer(self.transformer.read(condition.features), inputs, schedule, steps, cache)
        if self.config.tau_list is None:
            return x
        taus = [self._tau(schedule, step) for step in steps for _ in range(schedule.counts[step])]
        inverse = sent(1 / torch.tensor(taus), x.device)
        return torch.cat([x, inverse.view(1, -1, 1).expand(len(x), -1, -1)], -1)

    def drawn(self, actions: Tensor, schedule: ScaleSchedule, steps: int) -> dict[str, Tensor]:
        """See ``TeacherForced``."""
        return {"total": self.quantizer.accumulate(actions, schedule)[0]}

    def logits(self, hidden: Tensor) -> Tensor:
        """The head: [..., width] -> fp32 [..., bits, 2]; divided by tau where ``hidden`` carries it."""
        width = self.config.transformer.embed_dim
        logits = self.transformer.head(hidden[..., :width]).unflatten(-1, (-1, 2))
        return logits if hidden.shape[-1] == width else logits * hidden[..., width:].unsqueeze(-1)

    def _tau(self, schedule: ScaleSchedule, step: int) -> float:
        return 1.0 if self.config.tau_list is None else _entries(self.config.tau_list, schedule, "tau_list")[step]

    @torch.no_grad()
    def decode(self, actions: Tensor, schedule: ScaleSchedule | None = None) -> Tensor:
        """Pictures [batch, 3, H, W] in [0, 1] from all steps, or from the first ones."""
        total, _ = self.quantizer.accumulate(actions, schedule or self.default_schedule)
        return (self._autoencoder.picture(total) + 1) / 2

    @torch.no_grad()
    def encode(self, images: Tensor, schedule: ScaleSchedule | None = None) -> Tensor:
        """Actions [batch, tokens, bits] of pictures [batch, 3, H, W] in [0, 1], of the schedule's size."""
        return self.encode_with(images, schedule)[0]

    @torch.no_grad()
    def encode_with(
        self, images: Tensor, schedule: ScaleSchedule | None = None, corrupt: Corrupt | None = None
    ) -> tuple[Tensor, Tensor]:
        """As ``encode``, with other bits drawn than those found: (labels, drawn); see ``BitQuantizer.encode``."""
        schedule = schedule or self.default_schedule
        if tuple(images.shape[-2:]) != schedule.image_size:
            raise ValueError(f"pictures of this schedule are {schedule.image_size}, got {tuple(images.shape[-2:])}")
        return self.quantizer.encode(self._autoencoder.features(images * 2 - 1), schedule, corrupt)

    @property
    def _autoencoder(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(
                "this Infinity has no tokenizer: load it with weights={'tokenizer': path, ...} to make or read pictures"
            )
        return self.tokenizer


def _entries(values: Sequence[float] | float, schedule: ScaleSchedule, name: str) -> list[float]:
    """One number a scale."""
    if isinstance(values, int | float):
        return [float(values)] * len(schedule)
    if len(values) < len(schedule):
        raise ValueError(f"{name} has {len(values)} entries, the schedule has {len(schedule)} scales")
    return [float(value) for value in values[: len(schedule)]]
