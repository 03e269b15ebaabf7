"""Rewards to start from: any callable of pictures and prompts. See docs/rewards.md.

reward: examples.rewards:colourfulness
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from varl import Prompt


def colourfulness(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """How colourful pictures are (Hasler and Suesstrunk, 2003), a reward that asks nothing of the prompt.

    Grey pictures score 0, photographs about 0.1 to 0.4. It is cheap and easily overdone: it shows that a run works, and
    that a reward gets what it asks for.

    Args:
        images: [B, 3, H, W] in [0, 1].

    Returns:
        [B].
    """
    red, green, blue = images.float().flatten(2).unbind(1)
    opponents = (red - green, (red + green) / 2 - blue)
    spread = sum(o.var(1, correction=0) for o in opponents) ** 0.5
    shift = sum(o.mean(1) ** 2 for o in opponents) ** 0.5
    return spread + 0.3 * shift
