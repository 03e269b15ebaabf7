"""The training loop. ``Trainer.step`` reads like one update of the method, top to bottom."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from varl import updates
from varl.adapters import WithoutAdapters, merged, save_adapters, with_adapters
from varl.clock import Clock
from varl.config import TrainConfig
from varl.distributed import Distributed
from varl.ema import Average
from varl.ending import OUTLIVED_S
from varl.errors import naming_memory
from varl.evaluation.held_out import Evaluation, evaluate
from varl.learner import Batch, Learner
from varl.loading import autocast, choose_device, compute_alike, frozen_copy, prepare
from varl.models import save_policy
from varl.policy import Policy, Prompt
from varl.prompts import PromptStream, check_prompts, resolve_prompts
from varl.rewards import RewardOutput, check_reward, load_reward
from varl.rewards.scoring import Scoring
from varl.rollout import Rollout
from varl.run import faults, state
from varl.run.failures import FailureWindow
from varl.run.folder import RunFolder
from varl.run.loop import run_updates
from varl.run.notices import Notices
from varl.sizing import FIRST, fastest_micro_batch
from varl.transfer import Returning

__all__ = ["Trainer"]

logger = logging.getLogger(__name__)


ANEW = "a run of other settings needs another --run.out"
LOWER = {
    "rollout": f"draw fewer pictures at once: lower run.rollout_batch (0 draws all of an update at once); {ANEW}",
    "decode": f"decode fewer pictures at once: lower run.micro_batch; {ANEW}",
    "update": f"learn from fewer sequences at once: lower run.micro_batch, or set policy.checkpointing; {ANEW}",
}
"""What to do where memory runs out, by stage; ``update`` is every other one."""
OVERLAPPING = 4
"""Parts that an update's pictures are drawn in so that scoring them can overlap."""


@dataclass(frozen=True)
class Sampled:
    """The sequences of an update and what was made of them.

    Attributes:
        shown: the prompt of every picture.
        images: [pictures, 3, H, W] of ``drawn.whole``.
        output: their scores.
        reference_logp: of the trained sequences, for the loss.
    """

    shown: list[Prompt]
    drawn: updates.Drawn
    images: Tensor
    output: RewardOutput
    reference_logp: Tensor | None


class Trainer:
    """One training run: built from a configuration, checked, resumable.

    Everything random is drawn from (seed, update, row), from the position in the prompts, or by rewards from the global
    generators of torch, numpy and Python, which are seeded here and saved; so a run that goes on from a checkpoint
    gives the numbers of one that was never stopped.

    Attributes:
        update, pictures: optimizer updates made, and pictures scored for them.
        evaluated: the update of the last held-out evaluation, or None.
        best: the update and score of the best one, or None.

    Raises:
        ValueError, FileNotFoundError, RunError: before any work starts, if the configuration cannot be carried out.
    """

    def __init__(self, config: TrainConfig, distributed: Distributed | None = None) -> None:
        config = replace(config, policy=with_adapters(config.policy))
        self.config, run = config, config.run
        if run.threads:
            torch.set_num_threads(run.threads)
        if run.deterministic:
            compute_alike()
        state.seed_all(run.seed)
        self.distributed = distributed or Distributed.here(config.parallel, choose_device(run.device))
        self.device = self.distributed.device
        self.policy = prepare(config.policy, self.distributed.loads_on)
        self.fingerprint = state.fingerprint(cast(nn.Module, self.policy))
        self.schedule = self.policy.schedules(config.policy.resolution, config.policy.aspect_ratio)
        for kind in ("prefix", "suffix") if config.method.update == "alternate" else (config.method.update,):
            plan = updates.plan(kind, config.method, self.schedule)
            self.distributed.share(config.method.prompts * plan.sequences)

        if not config.method.prefix_gradient and not self.policy.shares_keys:
            raise ValueError(
                f"method.prefix_gradient false has no effect on this {config.policy.family}: its steps read no prefix"
            )
        p, e = config.prompts, config.evaluation
        prompts = resolve_prompts(p.source, count=p.count, seed=p.seed, region_counts=p.region_counts)
        if len(prompts) < config.method.prompts:
            raise ValueError(f"an update needs {config.method.prompts} prompts, {p.source} has {len(prompts)}")
        self.stream = PromptStream(prompts, seed=p.seed)
        self.held_out = resolve_prompts(e.source, count=e.count, seed=e.prompt_seed) if e.enabled else []
        for name, sampling in (("sampling", config.sampling), ("evaluation.sampling", e.sampling or config.sampling)):
            if sampling.top_k > self.policy.classes:
                raise ValueError(f"{name}.top_k is {sampling.top_k}; there are only {self.policy.classes} classes")
        self.reward = load_reward(config.reward)
        check_reward(self.reward, prompts, p.source)
        check_reward(self.reward, self.held_out, e.source)
        self.lora = config.policy.lora.rank > 0
        self.reference: Policy | None = None
        if config.method.needs_reference:
            self.reference = cast(Policy, WithoutAdapters(self.policy)) if self.lora else frozen_copy(self.policy)
        self._models = [self.policy] if self.lora or self.reference is None else [self.policy, self.reference]
        for policy in self._models:
            self.distributed.place(policy, config.policy.precision)
        with self.distributed.gathered(self.policy):
            for asked in (prompts, self.held_out):
                check_prompts(self.policy, asked, self.schedule)
        self.learner = Learner(
            self.policy,
            self.reference,
            config.method,
            config.optimizer,
            config.sampling,
            FIRST if run.micro_batch == "auto" else run.micro_batch,
            self.distributed,
        )
        self.ema = Average(self.policy.trainable, run.ema) if run.ema else None
        self.update, self.pictures = 0, 0
        self.evaluated: int | None = None
        self.best: tuple[int, float] | None = None
        self.failures = FailureWindow(run.failure_window, run.max_failed_share)
        self.clock = Clock(self.device)
        self._pool = ThreadPoolExecutor(1) if run.overlap else None
        self.kept: Sampled | None = None
        self.owed = False
        self._notices = Notices()
        patience = OUTLIVED_S if self.distributed.size > 1 else 0.0
        self.folder = RunFolder(config, self.distributed.main, patience)
        try:
            self._resume()
        except BaseException:
            self.folder.close()
            raise

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage of the step by name; stages inside it count for themselves."""
        faults.point(name)
        with naming_memory(LOWER.get(name, LOWER["update"])), self.clock.stage(name):
            yield

    def precision(self, drawing: bool = False) -> torch.autocast:
        """Where the policy computes: in bf16 if the configuration says so, with the weights in fp32."""
        return autocast(self.config.policy, self.device, drawing, not self.distributed.sharded)

    def step(self) -> dict[str, Any]:
        """One update; returns its record for the log."""
        method = self.config.method
        plan = updates.plan(updates.kind_of_update(method, self.update), method, self.schedule)
        total = method.prompts * plan.sequences
        mine = self.distributed.share(total)

        sampled = self._reused(plan) if plan.reuses else self._sample(plan, mine)
        drawn, output = sampled.drawn, sampled.output
        with self.stage("return"), self.precision():
            models, rows = (self.policy, self.reference), self.learner.micro_batch
            own = updates.returns(output, drawn, plan, method, *models, rows, self.config.sampling)
            value_PG, valid_PG = (self.distributed.gather(rows).view(-1, plan.group) for rows in own)
            advantages = updates.advantages(value_PG, valid_PG, method)
        with self.stage("mask"):
            mask = updates.masks(output, plan, self.schedule, method.mask, self.schedule.image_size)
            mask_BL = None if mask is None else mask[:, self.schedule.span(plan.steps)]
        learnt_from_P = updates.learnt_from(advantages, method)
        digests = self.distributed.gather_values(updates.digests(drawn.trained, mask_BL))
        cancelled = updates.cancelled(learnt_from_P, [digest for own in digests for digest in own], method)
        batch = Batch(
            sequences=drawn.trained,
            steps=plan.steps,
            advantage_B=advantages.advantage_PG.flatten()[mine.start : mine.stop].float(),
            valid_B=learnt_from_P.repeat_interleave(plan.group)[mine.start : mine.stop],
            mask_BL=mask_BL,
            rate=self.config.optimizer.suffix_scale if plan.kind == "suffix" else 1.0,
            segment=plan.kind,
            shared=self._shared(plan),
            reference_logp_BL=sampled.reference_logp,
            total=total,
            cancelled=cancelled,
        )
        record = updates.record(plan, self.distributed.gather_scores(output), value_PG, advantages)
        with self.precision():
            record |= self.learner.learn(batch, self.stage, self._due(self.config.run.diagnose_every))
        if self.distributed.main:
            self._notices.no_variance(self.update + 1, advantages, learnt_from_P, cancelled)
            self._notices.no_regions(output, method.mask)
        if self.ema is not None:
            self.ema.update()
        show = self._due(self.config.run.gallery_every)
        self.update += 1
        self.pictures += 0 if plan.reuses else method.prompts * plan.pictures
        record |= {"update": self.update, "pictures": self.pictures, "seconds": self.clock.seconds()}
        if show and self.distributed.main:
            self._show(sampled, plan, advantages.advantage_PG.flatten(), mask)
        return record

    def _sample(self, plan: updates.Plan, mine: range) -> Sampled:
        """Draw this process's sequences, and score their pictures: afterwards, or while the next ones are drawn."""
        method, run = self.config.method, self.config.run
        prompts = [prompt for _, prompt in self.stream.next(method.prompts)]
        pictures = range(mine.start * plan.continuations, mine.stop * plan.continuations)
        shown = [prompts[picture // plan.pictures] for picture in pictures]
        scoring = Scoring(self.reward, shown, self._pool)
        by_reference = method.continuations_by == "reference"

        def finished(part: Rollout) -> None:
            with self.stage("decode"):
                scoring.add(self._decode(part.actions))

        with self.distributed.gathered(*self._models[: 1 + by_reference], stage=self.stage):
            with self.stage("condition"):
                condition = self.policy.condition(prompts, self.schedule)
            with self.stage("rollout"), self.precision(drawing=True):
                drawn = updates.draw(
                    self.policy,
                    condition,
                    plan,
                    self.config.sampling,
                    (run.seed, self.update),
                    self.reference if by_reference else None,
                    run.rollout_batch or (-(-len(shown) // OVERLAPPING) if run.overlap else 0),
                    finished,
                    mine,
                )
        if run.micro_batch == "auto":
            self.learner.micro_batch = self._micro_batch(plan, drawn.trained)
        with self.stage("reference"), self.precision():
            reference_logp = self.learner.reference_logp(drawn.trained, plan.steps, self._shared(plan))
        with self.stage("reward"):
            images, output = scoring.result()
            output = self.distributed.alike(output)
        sampled = Sampled(shown, drawn, images, output, reference_logp)
        self.kept = sampled if method.suffix_state == "reused" else None
        return sampled

    def _micro_batch(self, plan: updates.Plan, sequences: Rollout) -> int:
        """What the first update of a kind measured, noted in the run folder so that a resumed run sums alike."""
        known = self.distributed.gather_values(self.folder.micro_batches())[0]
        if plan.kind not in known:
            with self.stage("measuring"), self.precision():
                known[plan.kind] = fastest_micro_batch(self.learner, sequences, plan.steps, self._shared(plan))
            logger.info("%s updates take %d sequences at a time", plan.kind, known[plan.kind])
            if self.distributed.main:
                self.folder.note_micro_batches(known)
        return known[plan.kind]

    def _shared(self, plan: updates.Plan) -> int:
        """Adjacent sequences of this process that surely go on from one prefix."""
        if plan.kind != "suffix":
            return 1
        return math.gcd(plan.tails, len(self.distributed.share(self.config.method.prompts * plan.sequences)))

    def _reused(self, plan: updates.Plan) -> Sampled:
        """What the prefix update before drew and scored, as groups of continuations."""
        assert self.kept is not None, "the alternation begins with a prefix update"
        kept, self.kept = self.kept, None
        whole = kept.drawn.whole
        with self.stage("reference"), self.precision():
            reference_logp = self.learner.reference_logp(whole, plan.steps, self._shared(plan))
        return replace(kept, drawn=updates.Drawn(whole, whole), reference_logp=reference_logp)

    def _show(self, sampled: Sampled, plan: updates.Plan, advantage_B: Tensor, mask: Tensor | None) -> None:
        keep = torch.arange(min(len(sampled.images), 4 * plan.pictures))
        trained = keep // plan.continuations
        self.folder.gallery(
            self.update,
            sampled.shown[: len(keep)],
            sampled.images[keep],
            sampled.output,
            advantage_B[trained],
            None if mask is None else mask[trained],
            self.schedule,
        )

    def run(self, progress: Callable[[dict[str, Any]], None] = lambda _: None) -> None:
        """Train until the configured number of updates, with evaluations, checkpoints and pictures on the way.

        Raises:
            Interrupted: after SIGTERM or SIGINT, with a checkpoint of the update that was under way.
            RunError: if a file cannot be written, too much failed, or the reward is hacked and that is to stop the run.
        """
        run_updates(self, progress)

    def evaluate(self) -> Evaluation:
        """Evaluate on the held-out prompts and note the result in the run folder."""
        faults.point("evaluation")
        lower = naming_memory(LOWER["decode"])
        own = state.own_generators(self.config.evaluation.seed)
        with lower, self._averaged(), self.distributed.gathered(self.policy), own:
            result = evaluate(
                self.policy,
                self.held_out,
                self.config.evaluation.sampling or self.config.sampling,
                self.reward,
                seed=self.config.evaluation.seed,
                batch=self.config.run.picture_batch,
                schedule=self.schedule,
                precision=self.precision(),
                distributed=self.distributed,
            )
        if self.distributed.main:
            self.folder.evaluation(self.update, self.pictures, result, self.config.evaluation.alarm_window)
        self.evaluated = self.update
        score = result.estimate(result.metrics[0]).value
        if self.best is None or score > self.best[1] or self.best[0] == self.update:  # the same, measured anew
            self.best = self.update, score
            self._export("best.safetensors")
        faults.point("evaluated")
        return result

    def save(self) -> None:
        """Write a checkpoint, in the background.

        Where several processes each hold some of the pictures that the next update reuses, one update later.
        """
        next_kind = updates.kind_of_update(self.config.method, self.update)
        self.owed = self.distributed.size > 1 and self.kept is not None and next_kind == "suffix"
        if self.owed:
            return
        best = None if self.best is None else self.best[0]
        self.folder.checkpoints.save(self.update, *state.collected(self), best)

    def _resume(self) -> None:
        checkpoint = self.folder.checkpoints.latest(partial(state.foreign, self))
        if checkpoint is not None:
            state.restore(self, checkpoint)
            logger.info("going on from update %d", self.update)
        if self.distributed.main:
            self.folder.begin(self.update, self.held_out)
        state.forget_removed(self)

    def finish(self) -> None:
        """Write the finished weights in the family's own format, and adapters as a file of their own."""
        faults.point("finish")
        if self.lora:
            lora = self.config.policy.lora

            def write() -> None:
                self.folder.export("adapters.safetensors", lambda path: save_adapters(self.policy, lora, path))

            with self._averaged():
                self.distributed.export(self.policy, write)
        self._export("weights.safetensors")

    def _export(self, name: str) -> None:
        def write() -> None:
            self.folder.export(name, lambda path: save_policy(self.policy, path))

        with self._averaged(), merged(self.policy) if self.lora else nullcontext():
            self.distributed.export(self.policy, write)

    def _averaged(self) -> AbstractContextManager[None]:
        """Where the policy is what is evaluated and exported: the average of its weights, if one is kept."""
        return nullcontext() if self.ema is None else self.ema.applied()

    def _due(self, every: int) -> bool:
        """Whether the update under way is the last one of its kind in ``every`` updates."""
        if every == 0:
            return False
        method, end = self.config.method, -(-(self.update + 1) // every) * every
        later = (updates.kind_of_update(method, update) for update in range(self.update + 1, end))
        return updates.kind_of_update(method, self.update) not in later  # looks no further than the next of its kind

    def _decode(self, actions: Tensor) -> Tensor:
        pictures = Returning()
        for part in actions.split(self.learner.micro_batch):
            pictures.add(self.policy.decode(part, self.schedule).float())
        return pictures.all()
