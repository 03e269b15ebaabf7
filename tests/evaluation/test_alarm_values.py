"""The alarm where it is just not raised: a rise of two standard errors, and an interval that ends at 0."""

import math

import pytest

from varl.evaluation.alarm import falling_metrics, rise
from varl.evaluation.held_out import Estimate

FELL = Estimate(-0.2, -0.3, -1e-9)


def test_what_is_beyond_noise() -> None:
    exactly_two = [0.0, 0.0, 1.0, 3.0]
    assert rise(exactly_two) == (2.0, 1.0)
    assert falling_metrics(exactly_two, {"ned": FELL}) == []
    assert falling_metrics([0.0, 0.0, 1.0, 2.9], {"ned": FELL}) == ["ned"]
    assert falling_metrics([0.0, 0.0, 1.0, 1.0], {"ned": Estimate(-0.2, -0.4, 0.0)}) == []
    # Metrics are told apart, and keep their order.
    changes = {"reward": FELL, "ned": Estimate(0.1, -0.1, 0.3), "word_accuracy": FELL}
    assert falling_metrics([0.0, 0.0, 1.0, 1.0], changes) == ["reward", "word_accuracy"]


def test_a_rise_is_of_halves() -> None:
    """Means and sample variances of the first and the last floor(n / 2) values."""
    values = [0.3, -1.0, 2.0, 0.7, 5.0, 4.0, 3.5]
    first, last = values[:3], values[4:]
    means = sum(first) / 3, sum(last) / 3
    variances = [sum((v - m) ** 2 for v in half) / 2 for half, m in zip((first, last), means, strict=True)]
    assert rise(values) == pytest.approx((means[1] - means[0], math.sqrt(sum(variances) / 3)))
    assert rise([1.0, 2.0, math.nan, 3.0]) == (0.0, math.inf)
    assert rise([1.0, 2.0, 3.0, 4.0])[0] == 2.0
