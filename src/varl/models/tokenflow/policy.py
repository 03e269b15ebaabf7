"""TokenFlow-T2I as a policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from varl.models.blocks import Cache
from varl.models.forcing import TeacherForced
from varl.models.state import DrawState
from varl.models.tokenflow.condition import PromptReader
from varl.models.tokenflow.config import TokenFlowConfig
from varl.models.tokenflow.model import Transformer
from varl.models.tokenflow.refine import draw_refined, published_passes
from varl.models.tokenflow.tokenizer import Tokenizer
from varl.policy import Condition, Prompt
from varl.sampling import Sampling
from varl.schedule import ScaleSchedule

__all__ = ["TokenFlow"]


class TokenFlow(TeacherForced):
    """See ``varl.policy.Policy`` for the contract its methods fulfil.

    A condition holds ``prompt``, ids [batch, P]: text padded on the left, and ``<img>``. What guidance leads away from
    is a negative prompt of the same length.

    Args:
        config: the shape.
        text: folder of Llama's tokenizer; without one, conditions are made from ids (``condition_from``).
    """

    family = "tokenflow"
    event: tuple[int, ...] = ()
    lora_targets = Transformer.lora_targets

    def __init__(self, config: TokenFlowConfig | None = None, text: str | Path | None = None) -> None:
        super().__init__()
        self.config = c = config or TokenFlowConfig()
        self._schedule = c.tokenizer.schedule
        self.classes = c.tokenizer.codebook_size
        self.tokenizer = Tokenizer(c.tokenizer).requires_grad_(False)
        self.transformer = Transformer(c.transformer, self._schedule, c.tokenizer.code_width, self.classes)
        self._reader = None if text is None else PromptReader(text, c.transformer)

    @property
    def default_schedule(self) -> ScaleSchedule:
        return self._schedule

    @property
    def trainable(self) -> nn.Module:
        """The part that reinforcement learning tunes; the tokenizer stays frozen."""
        return self.transformer

    def schedules(self, resolution: int | None = None, aspect_ratio: float | None = None) -> ScaleSchedule:
        """The only schedule.

        Raises:
            ValueError: if another resolution or aspect ratio is asked for.
        """
        side = self._schedule.image_size[0]
        if resolution not in (None, side) or aspect_ratio not in (None, 1.0):
            raise ValueError(f"TokenFlow draws {side}x{side} pictures only, not {resolution} at {aspect_ratio}")
        return self._schedule

    def guidance_ramp(self, schedule: ScaleSchedule) -> list[float]:
        """Guidance grows linearly from nothing at the first step to its full weight at the last."""
        return [step / max(len(schedule) - 1, 1) for step in range(len(schedule))]

    def condition(self, prompts: Sequence[Prompt], schedule: ScaleSchedule | None = None) -> Condition:
        """Prompts as ids, with the configuration's negative prompt for guidance.

        Raises:
            ValueError: if there is no prompt, or no text tokenizer to read them.
            ImportError: if transformers is not installed.
        """
        if not prompts:
            raise ValueError("a condition needs at least one prompt")
        if self._reader is None:
            raise ValueError(
                "TokenFlow needs its text tokenizer to read prompts: give its folder as the part 'text' of the "
                "weights, or give ids to condition_from"
            )
        rows = [self._reader.row(prompt.text) for prompt in prompts]
        return self.condition_from({"prompt": rows, "null": self._reader.row(self.config.negative_prompt)}, schedule)

    def text_tokens(self, text: str) -> tuple[int, int] | None:
        """The pieces of a text, and how many of them a condition holds; None if the text tokenizer does not count."""
        count = getattr(self._reader, "count", None)
        return None if count is None else count(text)

    def condition_from(self, features: Mapping[str, Any] | Any, schedule: ScaleSchedule | None = None) -> Condition:
        """A condition from ids made before.

        Args:
            features: ``prompt``, ids [batch, P] with [PAD] on the left and the pieces of ``<img>`` at the end, and
                ``null``, those of the negative prompt, [P], [1, P] or [batch, P]. Guidance needs the latter; ids alone
                stand for ``prompt``.

        Raises:
            ValueError: if ids do not fit the model or each other.
        """
        if schedule not in (None, self._schedule):
            raise ValueError(f"TokenFlow has one schedule, {self._schedule.describe()}; got {schedule.describe()}")
        given = features if isinstance(features, Mapping) else {"prompt": features}
        if "prompt" not in given or set(given) - {"prompt", "null"}:
            raise ValueError(f"TokenFlow's features are 'prompt' and 'null', not {sorted(given)}")
        ids = {name: self._ids(value, name) for name, value in given.items()}
        prompt, null = ids["prompt"], ids.get("null")
        if null is not None and (null.shape[1] != prompt.shape[1] or len(null) not in (1, len(prompt))):
            raise ValueError(f"prompts are {list(prompt.shape)} ids, the negative prompt {list(null.shape)}")
        return Condition(self._schedule, {"prompt": prompt}, {} if null is None else {"prompt": null})

    def _ids(self, value: Any, name: str) -> Tensor:
        lm = self.config.transformer
        ids = torch.as_tensor(value, device=self.transformer.model.pos_1LC.device).long()
        ids = ids[None] if ids.ndim == 1 else ids
        if ids.ndim != 2 or not ids.numel():
            raise ValueError(f"{name} must be ids [batch, positions], got {list(ids.shape)}")
        if int(ids.min()) < 0 or int(ids.max()) >= lm.image_token_start:
            raise ValueError(f"{name} must be ids of text, 0 to {lm.image_token_start - 1}")
        if bool((ids[:, -1] == lm.pad_token_id).any()):
            raise ValueError(f"{name} must be padded on the left and end with the pieces of <img>")
        if ids.shape[1] + self._schedule.tokens > lm.tokenizer_model_max_length:
            raise ValueError(
                f"{ids.shape[1]} positions of {name} and {self._schedule.tokens} tokens are more than "
                f"{lm.tokenizer_model_max_length} positions"
            )
        return ids

    @torch.no_grad()
    def start(self, condition: Condition, guidance: float = 0.0) -> DrawState:
        """An empty sequence; ``guidance`` is that of ``Sampling``, ramped over the steps.

        Raises:
            ValueError: if there is guidance, but no negative prompt.
        """
        prompt, copies = condition.features["prompt"], 1
        batch, positions = prompt.shape
        if guidance > 0:
            if "prompt" not in condition.null:
                raise ValueError("guidance needs a negative prompt: give its ids as 'null' to condition_from")
            prompt, copies = torch.cat([prompt, condition.null["prompt"].expand(batch, -1)]), 2
        cache = self.transformer.new_cache(positions)
        # What the next step reads: for step 0, whose token is the prompt's last, nothing.
        table = self.tokenizer.quantize.embedding_vqkd.weight
        read = table.new_zeros(batch, self.tokenizer.quantize.width, 1, 1)
        return DrawState(self._schedule, {"prompt": prompt}, {"read": read}, cache, copies, guidance)

    @torch.no_grad()
    def next_logits(self, state: DrawState) -> Tensor:
        """Logits of the next grid, [batch, tokens, classes], guided as the state asks."""
        step = state.step
        inputs = [state.drawn["read"].repeat(state.copies, 1, 1, 1)] if step > 0 else []
        hidden = self.transformer(state.passes["prompt"], inputs, range(step, step + 1), state.cache)
        logits = self.logits(hidden)
        if state.copies == 1:
            return logits
        t = state.guidance * self.guidance_ramp(self._schedule)[step]
        conditional, unconditional = logits.chunk(2)
        return conditional.mul_(1 + t).sub_(unconditional.mul_(t))

    @torch.no_grad()
    def advance(self, state: DrawState, actions: Tensor) -> None:
        """Consume the grid that was drawn, [batch, tokens of the step]; ``next_logits`` must have been called."""
        state.step += 1
        if state.step < len(self._schedule):
            before = state.drawn["read"] if state.step > 1 else None
            state.drawn["read"] = self.tokenizer.quantize.follow(before, actions, state.step)

    def features(self, condition: Condition, actions: Tensor, steps: range, cache: Cache | None) -> Tensor:
        """See ``TeacherForced``; the first step's pass reads the prompt."""
        if "prompt" not in condition.features:
            raise ValueError("the condition holds no ids; guidance needs a negative prompt")
        with torch.no_grad():
            inputs = self.tokenizer.quantize.inputs(actions, steps.stop)[max(steps.start - 1, 0) :]
        return self.transformer(condition.features["prompt"], inputs, steps, cache)

    def drawn(self, actions: Tensor, schedule: ScaleSchedule, steps: int) -> dict[str, Tensor]:
        """What the step after ``steps`` reads: see ``TeacherForced``."""
        with torch.no_grad():
            return {"read": self.tokenizer.quantize.inputs(actions, min(steps + 1, len(schedule)))[-1]}

    def logits(self, hidden: Tensor) -> Tensor:
        """The head: [..., width] -> [..., classes], in fp32; of text, no logits are computed."""
        return self.transformer.head(hidden).float()

    @torch.no_grad()
    def decode(self, actions: Tensor, schedule: ScaleSchedule | None = None) -> Tensor:
        """Pictures [batch, 3, H, W] in [0, 1] from all steps, or from the first ones."""
        return self.tokenizer.decode(actions)

    @torch.no_grad()
    def encode(self, images: Tensor, schedule: ScaleSchedule | None = None) -> Tensor:
        """Actions [batch, tokens] of pictures [batch, 3, H, W] in [0, 1].

        Raises:
            ValueError: if the pictures have another size.
        """
        if images.shape[1:] != (3, *self._schedule.image_size):
            height, width = self._schedule.image_size
            raise ValueError(f"TokenFlow encodes pictures [batch, 3, {height}, {width}], not {list(images.shape)}")
        return self.tokenizer.encode(images)

    def generate(
        self,
        condition: Condition,
        passes: int | Sequence[Sampling] = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Tensor:
        """Pictures [batch, 3, H, W] in [0, 1], each step drawn in several passes, of which the last counts.

        A pass after the first reads what the one before drew at the same step, so the result is no draw from the
        policy's distribution and has no log-probability: only pictures come back, and training is with ``rollout``.

        Args:
            passes: settings of every pass, with the same guidance; or how many passes, 1 to 3, of upstream's settings.
        """
        chosen = published_passes(passes, self.config.transformer.cfg) if isinstance(passes, int) else passes
        return self.decode(draw_refined(self, condition, chosen, generator))
