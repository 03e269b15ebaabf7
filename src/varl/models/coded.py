"""What VAR and Switti share as policies: codes of one ``VQVAE``, a transformer over its grids, one schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from varl.models.blocks import Cache, KeyValueCache
from varl.models.forcing import TeacherForced
from varl.models.parts import in_trainer, read_part
from varl.models.quantizer import resize_area
from varl.models.state import DrawState
from varl.models.vqvae import VQVAE
from varl.models.weights import Source, load_strict
from varl.policy import Condition
from varl.sampling import Sampling, filter_logits
from varl.schedule import ScaleSchedule

__all__ = [
    "TRAINED",
    "CodedPolicy",
    "GridTransformer",
    "check_tables",
    "load_tokenizer",
    "load_transformer",
    "mask_tables",
    "soft_codes",
]

TRAINED: dict[str, Sequence[Sequence[str]]] = {
    "transformer": in_trainer("var_wo_ddp", "var_fsdp", "var", "var_wo_ddp_ema", "var_ema"),
    "tokenizer": in_trainer("vae_local", "vae"),
}
"""Where files of upstream's own training hold the two parts; what was trained goes before its running average."""
MASK = "attn_bias_for_masking"


class GridTransformer(Protocol):
    """What ``CodedPolicy`` asks of a transformer.

    Called with the condition's tensors, one input map [B, width of a code, h, w] for each of ``steps`` but step 0,
    consecutive steps and a cache, it returns what ``head`` needs, [B, tokens of steps, C]. Without a cache the steps
    must start at 0, unless scales share no keys.
    """

    head: nn.Module

    def __call__(
        self, condition: Mapping[str, Tensor], inputs: list[Tensor], steps: range, cache: Cache | None = None
    ) -> Tensor: ...

    def new_cache(self) -> KeyValueCache | None: ...

    def prepare(self, condition: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is computed of the condition once for a whole drawing, where it is not there yet."""
        ...


def mask_tables(schedule: ScaleSchedule, causal: bool = True) -> tuple[Tensor, Tensor]:
    """The step of every token, int64 [1, L], and the mask that checkpoints carry, [1, 1, L, L] of 0 and -inf.

    Nothing here computes with them: attention goes grid by grid. ``causal``: a grid sees itself and all coarser ones;
    otherwise only itself.
    """
    counts = torch.tensor(schedule.counts)
    step = torch.arange(len(schedule)).repeat_interleave(counts, output_size=schedule.tokens)
    hidden = step[:, None] < step[None] if causal else step[:, None] != step[None]
    return step[None], torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)[None, None]


def check_tables(transformer: nn.Module, source: str, causal: bool = True) -> None:
    """That the tables a checkpoint brought are those of the schedule, and of the attention, that are asked for.

    Raises:
        ValueError: if not: the weights were trained for other grids or another attention.
    """
    model = cast(Any, transformer)
    if model.lvl_1L.is_meta:
        return
    steps, mask = mask_tables(model.schedule, causal)
    if not torch.equal(model.lvl_1L, steps):
        raise ValueError(f"weights of {source} were trained for other grids than {model.schedule.describe()}")
    if not torch.equal(getattr(model, MASK), mask):
        kind = "to all coarser grids" if causal else "inside a grid only"
        raise ValueError(f"weights of {source} were trained with another attention than {kind}")


def load_transformer(transformer: nn.Module, source: Source, causal: bool = True, hint: str = "") -> None:
    """Load a transformer's checkpoint and check its tables.

    Args:
        hint: added to the source's name where its tables are of another kind.
    """
    tensors, name = read_part(source, TRAINED["transformer"])
    load_strict(transformer, tensors, name, tables=[MASK])
    check_tables(transformer, name + hint, causal)


def load_tokenizer(tokenizer: VQVAE, source: Source) -> None:
    """Load a tokenizer's checkpoint; statistics of use for another number of steps are left out."""
    tensors, name = read_part(source, TRAINED["tokenizer"])
    used, own = tensors.get("quantize.ema_vocab_hit_SV"), tokenizer.quantize.ema_vocab_hit_SV
    if used is not None and used.shape[1:] == own.shape[1:] and len(used) != len(own):
        tensors["quantize.ema_vocab_hit_SV"] = torch.zeros(own.shape)
    load_strict(tokenizer, tensors, name)


def soft_codes(logits: Tensor, ratio: float, generator: torch.Generator | None = None) -> Tensor:
    """Gumbel-softmax weights of codes, of the shape of ``logits``, sharper from step to step (``ratio`` 0 to 1)."""
    temperature = max(0.27 * (1 - 0.95 * ratio), 0.005)
    noise = -torch.empty_like(logits).exponential_(generator=generator).log()
    return ((logits * (1 + ratio) + noise) / temperature).softmax(-1)


class CodedPolicy(TeacherForced):
    """See ``varl.policy.Policy`` for the contract; families add the condition and what their options change.

    Args:
        transformer: what reinforcement learning tunes.
        tokenizer: frozen.
    """

    family: str
    event: tuple[int, ...] = ()

    def __init__(self, transformer: nn.Module, tokenizer: VQVAE) -> None:
        super().__init__()
        self.transformer, self.tokenizer = transformer, tokenizer.requires_grad_(False)
        self.classes = tokenizer.config.vocab_size
        self.lora_targets: tuple[str, ...] = cast(Any, transformer).lora_targets

    @property
    def _model(self) -> GridTransformer:
        return cast(GridTransformer, self.transformer)

    @property
    def default_schedule(self) -> ScaleSchedule:
        return self.tokenizer.schedule

    @property
    def trainable(self) -> nn.Module:
        """The part that reinforcement learning tunes; the tokenizer stays frozen."""
        return self.transformer

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    def schedules(self, resolution: int | None = None, aspect_ratio: float | None = None) -> ScaleSchedule:
        """The only schedule of these weights.

        Raises:
            ValueError: if another resolution (the side of the square picture, in pixels) or aspect ratio is asked for.
        """
        side = self.default_schedule.image_size[0]
        if resolution not in (None, side) or aspect_ratio not in (None, 1.0):
            raise ValueError(
                f"these weights of {self.family} draw {side}x{side} pictures only; what was asked for is resolution "
                f"{resolution} at aspect ratio {aspect_ratio}"
            )
        return self.default_schedule

    def _check(self, schedule: ScaleSchedule | None) -> ScaleSchedule:
        if schedule not in (None, self.default_schedule):
            raise ValueError(
                f"these weights of {self.family} have one schedule, {self.default_schedule.describe()}; "
                f"got {schedule.describe()}"
            )
        return self.default_schedule

    def guidance_ramp(self, schedule: ScaleSchedule) -> list[float]:
        """Guidance grows linearly from nothing at the first step to its full weight at the last."""
        return [step / max(len(schedule) - 1, 1) for step in range(len(schedule))]

    @torch.no_grad()
    def start(self, condition: Condition, guidance: float = 0.0) -> DrawState:
        """An empty sequence; ``guidance`` is that of ``Sampling``, ramped over the steps.

        Raises:
            ValueError: if guidance is asked for and the condition has no unconditional twin.
        """
        passes, batch, copies = condition.features, condition.batch, 1
        if guidance > 0:
            if passes.keys() - condition.null.keys():
                raise ValueError(f"guidance needs the unconditional twin of {sorted(passes.keys())}")
            null = {name: condition.null[name].expand(batch, *value.shape[1:]) for name, value in passes.items()}
            passes, copies = {name: torch.cat([value, null[name]]) for name, value in passes.items()}, 2
        drawn = {"total": self.tokenizer.quantize.empty(batch)}
        cache = self._model.new_cache()
        return DrawState(condition.schedule, passes, drawn, cache, copies, guidance)

    @torch.no_grad()
    def next_logits(self, state: DrawState) -> Tensor:
        """Logits of the next grid, [batch, tokens, classes], guided as the state asks."""
        step = state.step
        ramp = self.guidance_ramp(state.schedule)
        if state.copies == 2 and not any(ramp[step:]):
            self._stop_guiding(state)
        inputs = []
        if step > 0:
            now = resize_area(state.drawn["total"], state.schedule.grids[step])
            inputs = [now.repeat(state.copies, 1, 1, 1)]
        state.passes = {**state.passes, **self._model.prepare(state.passes)}
        logits = self.logits(self._hidden(state.passes, inputs, range(step, step + 1), state.cache))
        if state.copies == 1:
            return logits
        conditional, unconditional = logits.chunk(2)
        t = state.guidance * ramp[step]
        return conditional.mul_(1 + t).sub_(unconditional.mul_(t))

    def _stop_guiding(self, state: DrawState) -> None:
        """Drop the unconditional rows: no step to come needs them."""
        one = replace(state, copies=1).select(range(state.batch))
        state.passes, state.cache, state.copies = one.passes, one.cache, 1

    @torch.no_grad()
    def advance(self, state: DrawState, actions: Tensor) -> None:
        """Consume the grid that was drawn, [batch, tokens of the step]; ``next_logits`` must have been called."""
        self._advance_codes(state, self.tokenizer.quantize.embedding(actions))

    def _advance_codes(self, state: DrawState, codes_BNC: Tensor) -> None:
        added = self.tokenizer.quantize.contribution_of(codes_BNC, state.step)
        state.drawn["total"] = state.drawn["total"] + added
        state.step += 1

    def _hidden(
        self, condition: Mapping[str, Tensor], inputs: list[Tensor], steps: range, cache: Cache | None
    ) -> Tensor:
        return self._model(condition, inputs, steps, cache)

    def features(self, condition: Condition, actions: Tensor, steps: range, cache: Cache | None) -> Tensor:
        """See ``TeacherForced``."""
        known = actions[:, : self._check(condition.schedule).offsets[steps.stop - 1]]
        with torch.no_grad():
            maps = self.tokenizer.quantize.accumulate(known, steps.stop)[1] if known.shape[1] else []
        return self._hidden(condition.features, maps[max(steps.start - 1, 0) :], steps, cache)

    def drawn(self, actions: Tensor, schedule: ScaleSchedule, steps: int) -> dict[str, Tensor]:
        """See ``TeacherForced``."""
        return {"total": self.tokenizer.quantize.features(actions)}

    def logits(self, hidden: Tensor) -> Tensor:
        """The head: [..., width] -> [..., classes], in fp32."""
        return self._model.head(hidden).float()

    @torch.no_grad()
    def decode(self, actions: Tensor, schedule: ScaleSchedule | None = None) -> Tensor:
        """Pictures [batch, 3, H, W] in [0, 1] from all steps, or from the first ones."""
        self._check(schedule)
        return self.tokenizer.decode(actions).float()

    @torch.no_grad()
    def encode(self, images: Tensor, schedule: ScaleSchedule | None = None) -> Tensor:
        """Actions [batch, tokens] of pictures [batch, 3, H, W] in [0, 1].

        Raises:
            ValueError: if the pictures have another size.
        """
        size = self._check(schedule).image_size
        if images.shape[1:] != (3, *size):
            raise ValueError(f"{self.family} encodes pictures [batch, 3, {size[0]}, {size[1]}], not {images.shape}")
        return self.tokenizer.encode(images)

    @torch.no_grad()
    def _generate(
        self,
        condition: Condition,
        sampling: Sampling,
        generator: torch.Generator | None,
        smooth: range,
        filtered: bool,
    ) -> Tensor:
        """Pictures drawn with one generator as upstream does, some steps with soft codes.

        Soft codes are mixtures, which no actions stand for: only pictures come back, and nothing can train on them.

        Args:
            smooth: the steps that take soft codes.
            filtered: make soft codes of filtered logits, after a draw whose result is not used.
        """
        state, quantizer = self.start(condition, sampling.guidance), self.tokenizer.quantize
        steps = len(condition.schedule)
        for step in range(steps):
            logits = self.next_logits(state)
            soft = step in smooth
            if filtered or not soft:
                logits = filter_logits(logits, sampling)
                drawn = logits.softmax(-1).flatten(0, 1).multinomial(1, replacement=True, generator=generator)
                codes = quantizer.embedding(drawn.view(logits.shape[:2]))
            if soft:
                weights = soft_codes(logits, step / max(steps - 1, 1), generator)
                codes = weights.to(quantizer.embedding.weight.dtype) @ quantizer.embedding.weight
            self._advance_codes(state, codes)
        return self.tokenizer.picture(state.drawn["total"]).float()
