"""Effective context with its interval, and the power law, against sums done another way."""

import itertools

import numpy as np
import pytest

from megatron_ext.study.measures import NoFit, effective_context, fit_power_law, wilson


def entry(length: int, *correct: int, samples: int = 10) -> dict:
    depths = [{"depth": 50.0, "samples": samples, "correct": count} for count in correct]
    return {"length": length, "depths": depths}


@pytest.mark.parametrize("correct", [0, 1, 7, 19, 20])
def test_the_interval_holds_the_shares_that_the_score_test_does_not_reject(correct: int) -> None:
    share = np.linspace(0, 1, 200_001)[1:-1]
    z = np.abs(correct / 20 - share) / np.sqrt(share * (1 - share) / 20)
    kept = share[z <= 1.959964]
    low, high = wilson(correct, 20)
    assert low == pytest.approx(kept.min(), abs=2e-5)
    assert high == pytest.approx(kept.max(), abs=2e-5)


def test_effective_context_by_hand() -> None:
    # Of 20 each: 20, 18, 15, 19. Wilson: (.839, 1), (.699, .972), (.531, .888), (.764, .991).
    lengths = [entry(128, 10, 10), entry(256, 9, 9), entry(512, 8, 7), entry(1024, 10, 9)]
    found = effective_context(lengths, 0.8)
    assert (found.tokens, found.low, found.high, found.longest) == (256, 128, 1024, 1024)
    # In any order, and 0 where the shortest length fails although a longer one does not.
    assert effective_context(lengths[::-1], 0.8) == found
    assert effective_context([entry(128, 2), entry(256, 10)], 0.8).tokens == 0
    assert effective_context([entry(128, 10)], 1.0).high == 128


def test_effective_context_is_the_longest_prefix_that_holds() -> None:
    for correct in itertools.product([0, 5, 8, 10], repeat=4):
        lengths = [entry(100 * (k + 1), count) for k, count in enumerate(correct)]
        found = effective_context(lengths, 0.8)
        holds = [k for k in range(5) if all(count >= 8 for count in correct[:k])]
        assert found.tokens == 100 * max(holds)
        assert found.low <= found.tokens <= found.high


@pytest.mark.parametrize(
    ("alpha", "beta", "gamma"), [(40.0, 0.5, 3.0), (900.0, 0.15, 1.6), (2.0, 1.5, 0.0)]
)
def test_the_fit_recovers_a_known_law(alpha: float, beta: float, gamma: float) -> None:
    context = [128, 256, 512, 1024, 2048, 4096]
    law = fit_power_law(context, [(alpha / c) ** beta + gamma for c in context])
    assert law.alpha == pytest.approx(alpha, rel=1e-3)
    assert law.beta == pytest.approx(beta, rel=1e-4)
    assert law.gamma == pytest.approx(gamma, abs=1e-3)
    assert law.rms < 1e-6
    assert law.at(300) == pytest.approx((alpha / 300) ** beta + gamma, rel=1e-5)


def test_no_other_law_nearby_fits_noisy_losses_better() -> None:
    context = np.array([128, 256, 512, 1024, 2048, 4096])
    noise = np.random.default_rng(0).normal(0, 0.01, 6)
    loss = (60 / context) ** 0.4 + 2.5 + noise
    law = fit_power_law(context.tolist(), loss.tolist())

    def rms(alpha: float, beta: float, gamma: float) -> float:
        return float(np.sqrt((((alpha / context) ** beta + gamma - loss) ** 2).mean()))

    assert law.rms == pytest.approx(rms(law.alpha, law.beta, law.gamma))
    for factors in itertools.product([0.95, 0.99, 1.0, 1.01, 1.05], repeat=3):
        a, b, g = factors
        assert law.rms <= rms(law.alpha * a, law.beta * b, law.gamma * g) + 1e-12


@pytest.mark.parametrize(
    ("context", "loss", "why"),
    [
        ([128, 256, 512], [4.0, 3.5, 3.2], "3 lengths within the trained context"),
        ([128, 256, 512, 1024], [3.0, 3.2, 3.3, 3.35], "does not fall"),
        ([128, 256, 512, 1024], [4.0, 3.0, 3.0, 3.0], "does not bend"),
    ],
)
def test_what_is_no_such_law_is_not_fitted(context: list, loss: list, why: str) -> None:
    with pytest.raises(NoFit, match=why):
        fit_power_law(context, loss)
