"""The derivative of the smoothed loss in log sigma, against closed forms, and the steps that follow from it."""

import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from flops_lightning.errors import SettingError
from flops_lightning.noise.kinds import NoiseSpec
from flops_lightning.strategies import LikelihoodRatio, PilotSpec
from flops_lightning.strategies.widths import RANGE, LearnedSigma
from tests.reference.layouts import COUNTS, TOKEN_SITES
from tests.reference.likelihood_ratio import assert_equals_reference
from tests.reference.networks import Loss, Shift, bound, estimated, gradients, squared_error

VARIANTS = ("plain", "baseline", "leave_one_out", "antithetic")
every_variant = pytest.mark.parametrize("variant", VARIANTS)
SITE = {"stages": ["0"], "sigma": 0.5}


def half_square(output: Tensor, target: Tensor) -> Tensor:
    """``||h - y||^2 / 2``; smoothed ``(||h - y||^2 + d sigma^2) / 2``, with the derivative ``d sigma^2``."""
    return 0.5 * (output - target).square().flatten(1).sum(1)


def below(output: Tensor, target: Tensor) -> Tensor:
    """1 where the first feature is below the target; smoothed ``Phi((y - h) / sigma)``."""
    return (output[:, 0] < target).to(output.dtype)


def strategy_on(loss: Loss, *shape: int, **settings: Any) -> LikelihoodRatio:
    return bound(nn.Sequential(Shift(*shape), nn.Identity()), loss, [SITE], **{"learn_sigma": 0.05, **settings})


def slopes(strategy: LikelihoodRatio, x: Tensor, y: Tensor, *, draws: int) -> Tensor:
    """``(k,)`` derivatives from fresh queries; sigma stays."""
    counts = torch.tensor([400, 1000, 200, 600]).numpy()
    found = []
    for _ in range(draws):
        clean = strategy.clean_pass(x, y)
        sums = strategy.engine.sums(strategy.sites[0], clean, counts)
        found.append(sums.slope())
    return torch.stack(found)


def assert_slope(found: Tensor, expected: float) -> None:
    mean, error = float(found.mean()), float(found.std()) / len(found) ** 0.5
    assert error < 0.02 * abs(expected), f"too noisy to tell: {mean:.4f} with the error {error:.4f}"
    assert abs(mean - expected) < 4 * error, f"slope {mean:.4f}, expected {expected:.4f}, error {error:.4f}"


@every_variant
@pytest.mark.parametrize("token_sigma", [False, True])
def test_of_a_quadratic(token_sigma, variant):
    """The mean square of tokens of different widths is 1, so the smoothed quadratic is the same."""
    x = 0.2 * torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    strategy = strategy_on(half_square, 3, 2, variant=variant, chunk_rows=1000, token_sigma=token_sigma)
    if token_sigma:
        tokens = {"mean": torch.tensor([1.0, 16.0, 81.0]), "error": torch.zeros(3), "mass": torch.ones(())}
        strategy._tokens.load_state_dict({"0": tokens})
    assert_slope(slopes(strategy, x, torch.zeros_like(x), draws=60), 6 * 0.5**2)


@pytest.mark.slow
@every_variant
def test_of_a_loss_that_takes_steps(variant):
    """``d/dlog(sigma) Phi(u) = -u phi(u)`` at ``u = (y - h) / sigma``, mean over the batch."""
    x = torch.tensor([[0.3], [0.4], [0.5], [0.6]], dtype=torch.float64).expand(4, 3).contiguous()
    u = [(0.0 - float(h)) / 0.5 for h in x[:, 0]]
    expected = sum(-v * stats.norm.pdf(v) for v in u) / 4
    strategy = strategy_on(below, 3, variant=variant, chunk_rows=1000)
    assert_slope(slopes(strategy, x, torch.zeros(4, dtype=torch.float64), draws=150), expected)


def test_the_steps_are_those_of_adam(monkeypatch):
    x = torch.randn(4, 3, dtype=torch.float64)
    strategy = strategy_on(half_square, 3, learn_sigma=0.03)
    seen: list[Tensor] = []
    step = LearnedSigma.step
    monkeypatch.setattr(LearnedSigma, "step", lambda s, site, slope: (seen.append(slope), step(s, site, slope)))
    used = []
    for _ in range(6):
        estimated(strategy, x, torch.zeros_like(x), torch.tensor([3, 0, 5, 2]))
        used.append(strategy.widths["0"].sigma)
    by_hand = torch.tensor(math.log(0.5), dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([by_hand], lr=0.03)
    for sigma, slope in zip(used, seen, strict=True):
        assert sigma == pytest.approx(float(by_hand.exp()), rel=1e-12)
        by_hand.grad = slope
        adam.step()
    assert len({*used}) == 6


@pytest.mark.parametrize("settings", [{"learn_sigma": 0.05}, {"token_sigma": True}], ids=["sigma", "tokens"])
def test_sigma_never_sees_the_queries_that_it_is_for(settings, tokens_net, tokens):
    """It changes with a batch's clean pass and stays for all that is estimated from it; so do widths of tokens."""
    strategy = bound(tokens_net, squared_error, [{"stages": ["0", "4"], "kind": "block", "sigma": 0.5}], **settings)

    def learned() -> set[str]:
        return {name for name, w in strategy.widths.items() if w.sigma != 0.5 or w.relative is not None}

    clean = strategy.clean_pass(*tokens)
    found = []
    for _ in range(2):
        strategy.estimate(clean)
        found.append(gradients(tokens_net))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    assert learned() == set()
    strategy.clean_pass(*tokens)
    assert learned() == ({"0", "2"} if "token_sigma" in settings else {"0", "2", "3", "4"})


@pytest.mark.parametrize(("loss", "expected"), [(half_square, 0.5 / RANGE), (below, 0.5 * RANGE)])
def test_sigma_goes_where_the_smoothed_loss_is_low_and_stops_at_its_bounds(loss, expected):
    """A quadratic likes none; samples on the wrong side of a step like as much as they can get."""
    x = torch.full((4, 2), -1.0, dtype=torch.float64)
    y = torch.zeros(4, dtype=torch.float64) if loss is below else x.clone()
    strategy = strategy_on(loss, 2, learn_sigma=0.2)
    for _ in range(40):
        estimated(strategy, x, y)
    assert strategy.widths["0"].sigma == pytest.approx(expected)


@pytest.mark.parametrize("layout", ["group", "block", "linear"])
@every_variant
def test_the_estimate_is_that_of_the_present_sigma(variant, layout, tokens_net, tokens):
    strategy = bound(tokens_net, squared_error, TOKEN_SITES[layout], variant=variant, learn_sigma=0.2, chunk_rows=6)
    for _ in range(2):
        estimated(strategy, *tokens)
    assert_equals_reference(tokens_net, strategy, *tokens, torch.tensor(COUNTS[variant]))
    assert all(abs(width.sigma / 0.5 - 1) > 0.05 for width in strategy.widths.values())


def test_lost_queries_do_not_move_sigma():
    def loss(output: Tensor, target: Tensor) -> Tensor:
        value = half_square(output, target)
        return torch.where(target[:, 0] > 0, math.nan, value)

    x = torch.randn(4, 3, dtype=torch.float64)
    y = torch.zeros_like(x)
    y[1:, 0] = 1.0
    strategy = strategy_on(loss, 3, pilots=PilotSpec())
    with pytest.warns(RuntimeWarning, match="lost every query"):
        estimated(strategy, x, y)
    alone = strategy_on(half_square, 3)
    estimated(alone, x[:1], y[:1])
    clean = strategy.clean_pass(x, y)
    alone.clean_pass(x[:1], y[:1])
    assert clean.loss.isnan().sum() == 3
    # Adam's first step has the length of its rate whatever the slope, if it has one.
    assert strategy.widths["0"].sigma == pytest.approx(alone.widths["0"].sigma, rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "layout", "message"),
    [
        *(
            ({"learn_sigma": rate}, "block", r".*must be a number above 0\. Write 0")
            for rate in (-0.1, math.inf, math.nan)
        ),
        *(
            ({"noise": NoiseSpec(**noise)}, "block", "0.1: needs dense Gaussian noise")
            for noise in ({"distribution": "rademacher"}, {"layout": "factored"}, {"orthogonal": True})
        ),
        ({}, "together", r"0.1: cannot be learned at '0..4'.*together: false"),
    ],
)
def test_settings_that_are_refused(settings, layout, message, tokens_net):
    with pytest.raises(SettingError, match=r"strategy\.learn_sigma = " + message):
        bound(tokens_net, squared_error, TOKEN_SITES[layout], **{"learn_sigma": 0.1, **settings})
