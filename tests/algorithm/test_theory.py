"""The numbers of method.md, section 3a, and Theorem 2, by enumeration."""

import itertools
import math

import pytest
import torch

from varl.algorithm import middle_return

from .toy import Toy, Tree

TABLE = [
    # c, b, V*, V+, mean, J with the prefix from V*, from V+, from the mean
    (2.0, 0.9, 1.4338, 1.0000, 1.0, 0.9287, 0.9512, 0.9512),
    (3.0, 1.2, 2.3554, 1.7304, 1.5, 1.4607, 1.5000, 1.4936),
]


def unrestricted(toy: Toy) -> torch.Tensor:
    """The converged suffix [2, 4] without the factorisation constraint."""
    weight = toy.old * toy.rewards.exp()
    return weight / weight.sum(1, keepdim=True)


@pytest.mark.parametrize("row", TABLE)
def test_every_number_of_the_table(row):
    c, b, v_star, v_plus, mean, j_star, j_plus, j_mean = row
    toy = Toy(c, b)
    # The reference is uniform, so its four suffixes are K = 4 draws in their exact proportions.
    soft = middle_return(toy.rewards, estimator="soft", eta=1.0)
    average = middle_return(toy.rewards, estimator="mean")
    constrained = torch.tensor([toy.constrained(0)[0], toy.constrained(1)[0]], dtype=torch.float64)
    assert soft[0].item() == pytest.approx(v_star, abs=5e-5)
    assert constrained[0].item() == pytest.approx(v_plus, abs=5e-5)
    assert average[0].item() == pytest.approx(mean, abs=1e-12)
    for value in (soft, constrained, average):
        assert value[1].item() == pytest.approx(b, abs=1e-6)
    assert toy.objective(soft, constrained) == pytest.approx(j_star, abs=5e-5)
    assert toy.objective(constrained, constrained) == pytest.approx(j_plus, abs=5e-5)
    assert toy.objective(average, constrained) == pytest.approx(j_mean, abs=5e-5)


def test_the_constrained_suffix_has_two_optima_at_c_3():
    _, where = Toy(3.0, 1.2).constrained(0)
    assert {(round(p, 2), round(q, 2)) for p, q in where} == {(0.07, 0.07), (0.93, 0.93)}
    # Both solve the stationarity condition logit p = c (2 q - 1); 0.07072 (method.md rounds it to 0.0708).
    p = 0.07
    for _ in range(200):
        p = 1 / (1 + math.exp(-3 * (2 * p - 1)))
    assert p == pytest.approx(0.0708, abs=1e-4)
    toy = Toy(3.0, 1.2)
    assert toy.suffix_value(0, toy.factorised(p, p)) == pytest.approx(toy.constrained(0)[0], abs=1e-5)
    assert toy.suffix_value(0, toy.factorised(1 - p, 1 - p)) == pytest.approx(toy.constrained(0)[0], abs=1e-5)
    # At c = 2, where the two part, there is one, flat to fourth order.
    _, where = Toy(2.0, 0.9).constrained(0)
    assert (0.5, 0.5) in where
    assert all(abs(p - 0.5) < 0.02 and abs(q - 0.5) < 0.02 for p, q in where)


def expectation_of_exp(policy, rewards, k, **options):
    """E[exp(V_m)] over all ordered K-tuples of continuations drawn from ``policy`` [4]."""
    draws = torch.tensor(list(itertools.product(range(4), repeat=k)))
    probability = policy[draws].prod(1)
    if options.get("estimator") == "soft-reference":
        options["logp"] = policy.log()[draws]
        options["reference_logp"] = torch.full_like(policy, 0.25).log()[draws]
    return float((probability * middle_return(rewards[draws], **options).exp()).sum())


def test_on_policy_log_mean_exp_counts_the_improvement_twice():
    toy = Toy(2.0, 0.9)
    suffix = unrestricted(toy)
    on_policy = torch.tensor(
        [math.log(expectation_of_exp(suffix[s], toy.rewards[s], 2, estimator="soft")) for s in (0, 1)]
    ).double()
    soft = middle_return(toy.rewards)
    assert on_policy[0].item() == pytest.approx(1.891, abs=5e-4)
    assert soft[0].item() == pytest.approx(1.434, abs=5e-4)
    # The converged unrestricted suffix earns V* from either state.
    assert toy.suffix_value(0, suffix[0]) == pytest.approx(soft[0].item(), abs=1e-12)
    assert toy.objective(on_policy, soft) == pytest.approx(1.1801, abs=5e-5)
    assert toy.objective(soft, soft) == pytest.approx(1.2021, abs=5e-5)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_soft_reference_is_unbiased_for_the_exponential_with_unnormalised_weights(k):
    toy = Toy(2.0, 0.9)
    v_star = middle_return(toy.rewards)[0].item()
    for policy in (unrestricted(toy)[0], toy.factorised(0.2, 0.9)):
        got = expectation_of_exp(policy, toy.rewards[0], k, estimator="soft-reference", self_normalised=False)
        assert got == pytest.approx(math.exp(v_star), rel=1e-9)


def test_soft_reference_self_normalised_is_biased_at_two_draws_but_consistent():
    toy = Toy(2.0, 0.9)
    policy = unrestricted(toy)[0]
    v_star = middle_return(toy.rewards)[0].item()
    small = expectation_of_exp(policy, toy.rewards[0], 2, estimator="soft-reference")
    assert abs(math.log(small) - v_star) > 0.05
    draws = torch.multinomial(policy, 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    large = middle_return(
        toy.rewards[0][draws],
        estimator="soft-reference",
        logp=policy.log()[draws],
        reference_logp=torch.full_like(policy, 0.25).log()[draws],
    )
    assert large.item() == pytest.approx(v_star, abs=0.01)
    on_policy = middle_return(toy.rewards[0][draws], estimator="soft")
    assert on_policy.item() == pytest.approx(1.891, abs=0.01)


def test_policy_estimator_is_the_value_of_the_suffix_and_tends_to_the_constrained_one():
    toy = Toy(3.0, 1.2)
    v_plus = toy.constrained(0)[0]
    p, gaps = 0.3, []
    for _ in range(40):
        suffix = toy.factorised(p, p)
        # One continuation each: the expectation over draws is the probability-weighted sum.
        single = middle_return(
            toy.rewards[0][:, None],
            estimator="policy",
            logp=suffix.log()[:, None],
            reference_logp=toy.old[0].log()[:, None],
        )
        value = float((suffix * single).sum())
        assert value == pytest.approx(toy.suffix_value(0, suffix), abs=1e-12)
        gaps.append(v_plus - value)
        p = 1 / (1 + math.exp(-3 * (2 * p - 1)))
    assert gaps[0] > 0.1
    assert gaps[-1] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("eta", [0.3, 1.0, 5.0])
def test_theorem_2_joins_the_two_optima_without_factorisation(m, eta):
    tree = Tree((3, 4, 5), eta, seed=m)
    prefix_old, suffix_old, rewards = tree.split(m)
    uniform = torch.full_like(suffix_old, -math.log(suffix_old.shape[1]))
    value = middle_return(rewards, estimator="soft-reference", eta=eta, logp=uniform, reference_logp=suffix_old.log())
    prefix = prefix_old * ((value - value.max()) / eta).exp()
    prefix = prefix / prefix.sum()
    suffix = suffix_old * (rewards / eta).exp()
    suffix = suffix / suffix.sum(1, keepdim=True)
    joined = (prefix[:, None] * suffix).reshape(tree.sizes)
    torch.testing.assert_close(joined, tree.optimum(), rtol=1e-9, atol=1e-12)
    best = tree.objective(joined)
    assert best == pytest.approx(eta * float((tree.old * (tree.rewards / eta).exp()).sum().log()), rel=1e-9)
    # It is a maximum: any other distribution, and the prefix that the plain mean gives, earn less.
    for seed in range(5):
        noise = torch.randn(tree.sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert tree.objective((joined.log() + 0.1 * noise).flatten().softmax(0)) < best
    mean = (suffix_old * rewards).sum(1)
    other = (prefix_old.log() + mean / eta).softmax(0)
    assert tree.objective(other[:, None] * suffix) < best - 1e-6
