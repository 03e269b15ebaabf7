"""The whole method in one file: GRPO for a next-scale image generator, with VMR, PANW and mask propagation.

    python examples/var_grpo.py --updates 20

Sun et al., "VAR RL Done Right" (arXiv 2601.02256), on the embedded model Inkling with a real OCR as the reward. Read it
from top to bottom: there is no trainer, and nothing of the algorithm is imported. Its numbers are those of
`varl train recipes/inkling-ocr.yaml`, step for step; tests/test_example.py holds the two against each other.

Shapes are suffixes: P prompts, G sequences of a prompt that are compared (a group), K continuations of a sequence,
B = P * G trained sequences, L tokens of the trained steps, V codes a token chooses from.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from varl import Condition, Policy, Prompt, ScaleSchedule, load_policy
from varl.models import save_policy
from varl.prompts import PromptStream, inkling_prompts
from varl.rewards import Reward
from varl.rewards.ocr import OcrReward
from varl.rollout import row_generators


@dataclass(frozen=True)
class Settings:
    """Those of recipes/inkling-ocr.yaml."""

    seed: int = 0
    prompts: int = 4
    """P: prompts an update."""
    group: int = 8
    """G: sequences of a prompt that are compared with one another."""
    continuations: int = 1
    """K: pictures that a prefix is valued by."""
    middle: str = "grid:6"
    """Where the prefix ends: with the grid of this side."""
    prefix_updates: int = 9
    suffix_updates: int = 1
    eta: float = 1.0
    """Temperature of the middle return."""
    alpha: float = 0.3
    """Exponent of the step weights."""
    clip: float = 0.2
    beta: float = 0.01
    """Weight of the KL to the initial policy."""
    guidance: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    learning_rate: float = 2e-4
    warmup_from: float = 1e-5
    warmup_updates: int = 5
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    clip_norm: float = 1.0


# --- Sampling: every step emits a whole grid of tokens, each drawn independently given the grids before it. ---


def draw_grid(logits_BNV: Tensor, generators: Sequence[torch.Generator], settings: Settings) -> Tensor:
    """One draw a token, [B, N], after top-k and top-p; row i's noise comes from generator i alone."""
    if settings.top_k:
        kth = logits_BNV.topk(settings.top_k, dim=-1).values[..., -1:]
        logits_BNV = logits_BNV.masked_fill(logits_BNV < kth, -torch.inf)
    if settings.top_p < 1:
        ascending, order = logits_BNV.sort(dim=-1, stable=True)
        drop = ascending.softmax(-1).cumsum(-1) <= 1 - settings.top_p
        drop[..., -1] = False
        logits_BNV = logits_BNV.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
    # Where a uniform number falls in the cumulative distribution; a little short of 1, so that rounding stays in range.
    uniform = torch.stack([torch.rand(logits_BNV.shape[1:2], generator=g) for g in generators])
    below = logits_BNV.softmax(-1).cumsum(-1)
    reached = uniform.clamp_(max=1 - 2**-22).unsqueeze(-1) * below[..., -1:]
    return torch.searchsorted(below, reached, right=True).squeeze(-1)


def sample(
    policy: Policy, condition: Condition, m: int, tails: int, seed: tuple[int, ...], settings: Settings
) -> Tensor:
    """Draw a prefix of m steps a row and ``tails`` continuations of each: actions [rows * tails, tokens].

    The prefix is computed once; its continuations branch off its key/value cache.
    """
    grids: list[Tensor] = []
    state = policy.start(condition, settings.guidance)
    generators = row_generators((*seed, 0), condition.batch)
    for step in range(len(condition.schedule)):
        if step == m:
            state = state.fork(tails)
            grids = [grid.repeat_interleave(tails, 0) for grid in grids]
            generators = row_generators((*seed, 1), condition.batch * tails)
        grids.append(draw_grid(policy.next_logits(state), generators, settings))
        policy.advance(state, grids[-1])
    return torch.cat(grids, 1)


# --- Mask propagation (paper, section 3.5): which tokens does a region of the picture come from? ---

Points = list[tuple[float, float]]


def part(polygon: Points, axis: int, low: float) -> Points:
    """The part of a polygon with coordinate ``axis`` between low and low + 1."""
    for line, sign in ((low, 1), (low + 1, -1)):
        kept: Points = []
        for p, q in zip(polygon, polygon[1:] + polygon[:1], strict=True):
            inside_p, inside_q = sign * (p[axis] - line), sign * (q[axis] - line)
            if inside_p >= 0:
                kept.append(p)
            if inside_p * inside_q < 0:
                t = inside_p / (inside_p - inside_q)
                kept.append((p[0] + t * (q[0] - p[0]), p[1] + t * (q[1] - p[1])))
        polygon = kept
    return polygon


def area(polygon: Points) -> float:
    following = polygon[1:] + polygon[:1]
    return abs(sum(p[0] * q[1] - p[1] * q[0] for p, q in zip(polygon, following, strict=True))) / 2


def within(polygon: Points, axis: int, side: int) -> range:
    """The rows (axis 1) or columns (axis 0) of a grid that a polygon may touch."""
    values = [point[axis] for point in polygon]
    return range(max(math.floor(min(values)), 0), min(math.ceil(max(values)), side)) if values else range(0)


def token_mask(polygons: Sequence[Any], schedule: ScaleSchedule) -> Tensor:
    """The mask of all tokens, [tokens]: 1 where a token's cell overlaps a polygon, traced back from fine to coarse."""
    side = schedule.grids[-1][0]
    finest = torch.zeros(side, side)
    for pixels in polygons:
        polygon = [(float(x) / schedule.stride, float(y) / schedule.stride) for x, y in pixels]
        for row in within(polygon, 1, side):
            strip = part(polygon, 1, row)
            for column in within(strip, 0, side):
                if area(part(strip, 0, column)) > 1e-6:
                    finest[row, column] = 1
    if not finest.any():
        finest.fill_(1)  # nothing was found: such failures need gradient everywhere
    masks = [finest[None, None]]
    for grid in reversed(schedule.grids[:-1]):
        masks.append(F.adaptive_max_pool2d(masks[-1], grid))
    return torch.cat([mask.flatten() for mask in reversed(masks)])


# --- Training. ---


def train(
    policy: Policy, reward: Reward, prompts: Sequence[Prompt], settings: Settings, updates: int
) -> Iterator[dict[str, Any]]:
    """Tune ``policy.trainable`` in place; yields a record after every update."""
    s, schedule, taken = settings, policy.default_schedule, 0
    reference = copy.deepcopy(policy)
    cast(nn.Module, reference).requires_grad_(False)
    parameters = list(policy.trainable.parameters())
    # Tables of which an update reads a few rows only: decay would move the others, which have no gradient.
    tables = [p for n, p in policy.trainable.named_parameters() if n in getattr(policy.trainable, "undecayed", ())]
    others = [p for p in parameters if all(p is not table for table in tables)]
    groups: list[dict[str, Any]] = [{"params": others}, {"params": tables, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, s.learning_rate, betas=s.betas, weight_decay=s.weight_decay)
    stream = PromptStream(prompts)
    m, total = schedule.middle(s.middle), len(schedule)

    for update in range(updates):
        begin = time.perf_counter()

        # Alternate: most updates train the prefix (the coarse steps), some the suffix (the fine). A prefix update draws
        # G prefixes a prompt and K continuations of each; a suffix update draws one prefix and G continuations of it,
        # so that in both cases a group differs only in what is trained.
        prefix = update % (s.prefix_updates + s.suffix_updates) < s.prefix_updates
        steps = range(m) if prefix else range(m, total)
        heads, tails, k = (s.group, s.continuations, s.continuations) if prefix else (1, s.group, 1)

        # Rollout: pictures, their rewards, and the regions that the rewards are about.
        chosen = [prompt for _, prompt in stream.next(s.prompts)]
        condition = policy.condition(chosen)
        actions = sample(policy, condition.repeat(heads), m, tails, (s.seed, update), s)
        images = policy.decode(actions)
        output = reward(images, [prompt for prompt in chosen for _ in range(heads * tails)])

        # Value as Middle Return (Eq. 10): a prefix is worth the log-mean-exp of its continuations' rewards. A sequence
        # with a failed reward is left out with its whole group; it is never scored 0.
        failed_PG = output.failed.view(s.prompts, s.group, k).any(2)
        reward_PGK = output.score.nan_to_num().view(s.prompts, s.group, k)
        best_PG1 = reward_PGK.amax(2, keepdim=True)
        return_PG = best_PG1.squeeze(2) + s.eta * ((reward_PGK - best_PG1) / s.eta).expm1().mean(2).log1p()

        # GRPO's advantage: how good a sequence is among those of its own prompt. Where all are equal but for rounding,
        # nothing can be learnt, and dividing by their spread would make something of nothing: the group is left out.
        dropped_P1 = failed_PG.any(1, keepdim=True)
        spread_P1 = return_PG.amax(1, keepdim=True) - return_PG.amin(1, keepdim=True)
        equal_P1 = spread_P1 <= 8 * torch.finfo(torch.float32).eps * return_PG.abs().amax(1, keepdim=True)
        mean_P1 = return_PG.mean(1, keepdim=True)
        std_P1 = return_PG.std(1, unbiased=False, keepdim=True)
        advantage_PG = ((return_PG - mean_P1) / (std_P1 + 1e-6)).masked_fill(equal_P1 | dropped_P1, 0.0)
        advantage_B1 = advantage_PG.view(-1, 1)
        valid_B1 = (~(equal_P1 | dropped_P1)).expand_as(advantage_PG).reshape(-1, 1).float()

        # Mask propagation: only tokens that the regions of a sequence's pictures trace back to carry the policy term.
        # A prefix has K pictures; its mask is the union of theirs.
        trained, found = schedule.span(steps), output.regions or [[] for _ in images]
        own = [[polygon for regions in found[i : i + k] for polygon in regions] for i in range(0, len(found), k)]
        mask_BL = torch.stack([token_mask(polygons, schedule) for polygons in own])[:, trained]

        # Per-Action Normalization Weighting (Eq. 9): a token of step t weighs k_t = 1 / n_t^alpha, over the sum of all
        # trained tokens' weights. Without it the last grids, with most of the tokens, would hold most of the loss.
        counts = torch.tensor([schedule.counts[step] for step in steps], dtype=torch.float64)
        k_T = counts.pow(-s.alpha)
        weight_L = (k_T / (k_T * counts).sum()).repeat_interleave(counts.long()).float()

        # Log-probabilities of the trained steps, teacher-forced: under the model itself, unguided and untruncated.
        sequences, rows = actions[::k], condition.repeat(s.group)
        target_BL1 = sequences[:, trained].unsqueeze(2)
        logits_BLV = policy.logits(policy.hidden(rows, sequences, steps))
        logp_BL = logits_BLV.log_softmax(2).gather(2, target_BL1).squeeze(2)
        with torch.no_grad():
            reference_BLV = reference.logits(reference.hidden(rows, sequences, steps))
            reference_logp_BL = reference_BLV.log_softmax(2).gather(2, target_BL1).squeeze(2)

        # The clipped objective and the k3 estimate of the KL. On policy the ratio is 1 in value; its gradient is not.
        ratio_BL = (logp_BL - logp_BL.detach()).exp()
        clipped_BL = ratio_BL.clamp(1 - s.clip, 1 + s.clip)
        policy_BL = -torch.minimum(ratio_BL * advantage_B1, clipped_BL * advantage_B1) * mask_BL
        difference_BL = reference_logp_BL - logp_BL
        kl_BL = difference_BL.expm1() - difference_BL
        weight_BL, n = weight_L * valid_B1, len(sequences)
        loss = (policy_BL * weight_BL / n).sum() + (kl_BL * weight_BL * (s.beta / n)).sum()

        # A step of AdamW after a linear warm-up. A loss or gradient that is not finite costs this step, not the run;
        # and where every group is left out, momentum and weight decay must not move the weights by themselves.
        optimizer.zero_grad()
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(parameters, s.clip_norm))
        if math.isfinite(norm) and bool(loss.isfinite()) and bool(valid_B1.any()):
            warm = min(1.0, taken / s.warmup_updates) if s.warmup_updates else 1.0
            for group in optimizer.param_groups:
                group["lr"] = s.warmup_from * (1 - warm) + s.learning_rate * warm
            optimizer.step()
            taken += 1

        yield {
            "update": update + 1,
            "kind": "prefix" if prefix else "suffix",
            "reward": output.score,
            "parts": output.parts,
            "dropped_groups": int(dropped_P1.sum()),
            "advantage": advantage_PG,
            "masked": float(mask_BL.mean()),
            "kl": float(kl_BL.detach().mean()),
            "loss": loss.item(),
            "gradient_norm": norm,
            "seconds": time.perf_counter() - begin,
        }


def pictures(policy: Policy, prompts: Sequence[Prompt], settings: Settings) -> Tensor:
    """One picture a prompt, from draws that are the same every time: a row of them, [3, height, width]."""
    condition = policy.condition(prompts)
    images = policy.decode(sample(policy, condition, len(condition.schedule), 1, (settings.seed,), settings))
    return torch.cat(list(F.pad(images, (2, 2, 2, 2), value=1.0)), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description="Tune Inkling to write legibly: GRPO with VMR, PANW and MP.")
    parser.add_argument("--updates", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", help="a checkpoint of Inkling; by default the one of the package")
    parser.add_argument("--out", type=Path, default=Path("runs/var_grpo"), help="folder for what comes out")
    options = parser.parse_args()

    settings = Settings(seed=options.seed)
    policy = load_policy("inkling", weights=options.weights)
    reward = OcrReward({"threads": 2})
    held_out = inkling_prompts(8, seed=1, held_out=True)
    before = pictures(policy, held_out, settings)
    for r in train(policy, reward, inkling_prompts(2048), settings, options.updates):
        print(
            f"{r['update']:4d} {r['kind']}  reward {r['reward'].nanmean():+.3f}  "
            f"word accuracy {r['parts']['word_accuracy'].nanmean():.2f}  loss {r['loss']:+.4f}  KL {r['kl']:.4f}  "
            f"gradient {r['gradient_norm']:.2f}  masked {r['masked']:.0%}  dropped {r['dropped_groups']}  "
            f"{r['seconds']:.1f} s",
            flush=True,
        )

    options.out.mkdir(parents=True, exist_ok=True)
    save_policy(policy, options.out / "weights.safetensors")
    rows = torch.cat([before, pictures(policy, held_out, settings)], 1)
    pixels = (rows * 255).round().byte().permute(1, 2, 0).numpy()
    sheet = Image.fromarray(pixels)
    sheet.resize((3 * sheet.width, 3 * sheet.height), Image.Resampling.NEAREST).save(options.out / "before_after.png")
    print(f"weights and pictures (before above, after below): {options.out}")


if __name__ == "__main__":
    main()
