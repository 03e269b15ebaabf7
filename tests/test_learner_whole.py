"""Whole gradient steps: the prefix's gradient, the weights of the KL, and the norms by step, however micro-batched."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bits import Bits
from learning import assert_close, batch, drawn, learned
from small import make_inkling
from varl.config import MaskConfig, MethodConfig

# --- The prefix's gradient. ---


@pytest.mark.parametrize("state", ["shared", "independent"])
def test_without_the_prefixs_gradient_micro_batches_change_nothing(state: str) -> None:
    policy = make_inkling()
    method = MethodConfig(middle=3, group=4, beta=0, suffix_state=state, prefix_gradient=False)  # type: ignore[arg-type]
    made = drawn(policy, "suffix", method)
    if state == "independent":
        made.shared = 1
    whole, _ = learned(policy, made, method, None, 8)
    for micro_batch in (1, 2, 3):
        parts, _ = learned(policy, made, method, None, micro_batch)
        assert_close(whole, parts)
    exact, _ = learned(policy, made, replace(method, prefix_gradient=True), None, 8)
    difference = max(float((a - b).abs().max()) for a, b in zip(whole, exact, strict=True))
    assert difference > 0.01 * max(float(a.abs().max()) for a in exact)


# --- The KL's weights where only masked tokens are counted. ---


def test_the_kl_keeps_the_grids_weights_where_masked_tokens_are_counted() -> None:
    """With no advantage the KL is all there is: unmasked, it does not change with what the policy term counts."""
    policy, reference = Bits().double(), Bits(1).double()
    made = batch(policy)
    made.advantage_B = torch.zeros_like(made.advantage_B)
    grid, masked, both = (
        learned(policy, made, MethodConfig(beta=0.3, mask=mask), reference)[0]
        for mask in (MaskConfig(), MaskConfig(count="masked"), MaskConfig(count="masked", kl=True))
    )
    assert_close(grid, masked, tolerance=1e-9)
    assert max(float((a - b).abs().max()) for a, b in zip(grid, both, strict=True)) > 1e-4


# --- The norm of every step's gradient. ---


def test_the_norms_by_step_are_of_all_sequences() -> None:
    policy, reference = Bits().double(), Bits(1).double()
    made, method = batch(policy), MethodConfig(beta=0.3)
    _, whole = learned(policy, made, method, reference, 8)
    for micro_batch in (1, 2, 3):
        _, parts = learned(policy, made, method, reference, micro_batch)
        assert parts["gradient_norm_by_step"] == pytest.approx(whole["gradient_norm_by_step"], rel=1e-9)
    # The steps' gradients add up to the whole: with one step it is the norm itself.
    _, one = learned(policy, batch(policy, range(1, 2)), method, reference, 2)
    assert one["gradient_norm_by_step"] == [pytest.approx(one["gradient_norm"])]
