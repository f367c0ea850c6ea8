"""Relative widths of tokens: how they are learned, what they save, and that they bias nothing."""

import copy

import pytest
import torch
from torch import Tensor, nn

from flops_lightning.errors import SettingError
from flops_lightning.strategies import LikelihoodRatio, PilotSpec, site_queries
from flops_lightning.strategies.delta import DeltaSums
from flops_lightning.strategies.widths import HALF_LIFE, LIMIT, RunningMean, TokenSigma
from tests.reference.layouts import COUNTS, VIT_SITES, convolutional, vit_for
from tests.reference.likelihood_ratio import (
    assert_equals_reference,
    in_parameter_space,
    reference_gradient,
    reference_traces,
)
from tests.reference.networks import Shift, assert_entries, bound, cross_entropy, estimated, gradients, squared_error
from tests.reference.smoothed import flat

LAYOUTS = ("group", "block", "linear", "convolutions")
CONVOLUTIONS = [{"stages": ["0", "6"], "kind": "linear", "sigma": 0.1}]


def linear_loss(output: Tensor, target: Tensor) -> Tensor:
    """``(b,)`` inner products: the derivative at every token is the target's."""
    return (output * target).flatten(1).sum(1)


def uneven_problem(tokens: int = 8, features: int = 16, batch: int = 4) -> tuple[nn.Sequential, Tensor, Tensor, Tensor]:
    """Tokens whose derivatives differ by factors of two, and ``(t,)`` their mean squared norms over the batch."""
    x = torch.randn(batch, tokens, features, dtype=torch.float64)
    g = torch.randn(batch, tokens, features, dtype=torch.float64) * 2.0 ** torch.arange(tokens)[:, None]
    return nn.Sequential(Shift(tokens, features), nn.Identity()), x, g, g.square().sum(2).mean(0)


def trained(strategy: LikelihoodRatio, x: Tensor, y: Tensor, *, steps: int, counts: Tensor | None = None) -> None:
    """Some steps that train the widths and leave the parameters."""
    for _ in range(steps):
        estimated(strategy, x, y, counts)


def test_the_average_is_exponential_and_corrected_for_its_start():
    generator = torch.Generator().manual_seed(0)
    steps = torch.rand(5, 6, 3, generator=generator, dtype=torch.float64)
    running = RunningMean.empty(steps[0, 0])
    for step in steps:
        running = running.updated(step)
    weights = torch.tensor([0.5 ** ((4 - i) / HALF_LIFE) for i in range(5)], dtype=torch.float64)
    weights /= weights.sum()
    torch.testing.assert_close(running.mean / running.mass, (weights[:, None] * steps.mean(1)).sum(0))
    expected = (weights.square()[:, None] * steps.var(1) / 6).sum(0)
    torch.testing.assert_close(running.error / running.mass**2, expected)


def test_samples_without_two_queries_are_left_out():
    squares = torch.tensor([[1.0, 2.0], [torch.nan, torch.nan], [3.0, 6.0]])
    running = RunningMean.empty(squares[0]).updated(squares)
    torch.testing.assert_close(running.mean / running.mass, torch.tensor([2.0, 4.0]))
    again = running.updated(squares[:2])  # a single sample has no standard error
    torch.testing.assert_close(torch.stack([*again.mean, *again.error]), torch.stack([*running.mean, *running.error]))
    assert again.mass == running.mass


def settled(rho: Tensor, error: Tensor) -> RunningMean:
    return RunningMean(rho, error.square(), torch.ones(()))


@pytest.mark.parametrize(
    ("rho", "error", "expected"),
    [
        ([1.0, 16.0, 81.0], 0.0, [1.0, 1 / 2, 1 / 3]),
        ([1e-12, 1.0, 1.0], 0.0, [LIMIT * (3 / 2) ** 0.25, 1.0, 1.0]),  # limited
        ([-0.3, 0.1, 1.0], 0.2, [0.2**-0.25, 0.2**-0.25, 1.0]),  # at least the standard error
    ],
)
def test_widths_are_the_fourth_root_of_the_inverse(rho, error, expected):
    r = settled(torch.tensor(rho), torch.full((3,), error)).widths()
    torch.testing.assert_close(r / r[2], torch.tensor(expected) / expected[2])
    torch.testing.assert_close(r.square().mean(), torch.tensor(1.0))


@pytest.mark.parametrize("squares", [torch.zeros(4, 3), torch.full((4, 3), torch.nan), torch.ones(1, 3)])
def test_without_knowledge_all_tokens_are_alike(squares):
    torch.testing.assert_close(RunningMean.empty(squares[0]).updated(squares).widths(), torch.ones(3))


def test_what_counts_was_chosen_for_noise_alone():
    """Estimates that are nothing but noise, many tokens: the widths they give cost next to nothing."""
    generator = torch.Generator().manual_seed(0)
    running = RunningMean.empty(torch.zeros(200))
    for _ in range(60):
        running = running.updated(1 + 200 * torch.randn(64, 200, generator=generator))
    r = running.widths()
    assert float(r.square().mean() * r.pow(-2).mean()) < 1.1


@pytest.mark.parametrize(
    ("variant", "layout"),
    [
        *(("baseline", layout) for layout in LAYOUTS),
        *((variant, "group") for variant in ("plain", "leave_one_out", "antithetic")),
        *(("antithetic", layout) for layout in ("block", "convolutions")),
    ],
)
def test_equals_the_reference(variant, layout, images):
    """Gradients and traces, on tokens and on the positions of feature maps."""
    net, sites = (convolutional(), CONVOLUTIONS) if layout == "convolutions" else (vit_for(layout), VIT_SITES[layout])
    strategy = bound(net, cross_entropy, sites, variant=variant, chunk_rows=6, token_sigma=True)
    trained(strategy, *images, steps=3)
    base = torch.tensor(COUNTS[variant])
    table = torch.stack([base.roll(s) for s in range(len(strategy.sites))])
    assert_equals_reference(net, strategy, *images, table)
    widths = [strategy.widths[site.name].relative for site in strategy.sites]
    assert float(widths[0].max() / widths[0].min()) > 1.1
    assert widths[0].shape == (16,) if layout == "convolutions" else widths[-1] is None, "the head sees one token"
    draw, clean = strategy.draw, strategy.clean_pass(*images)
    seen = strategy.estimate(clean, table, traces=True).observation
    for i, site in list(enumerate(strategy.sites))[:3]:
        own = {"in_parameters": in_parameter_space(site), "draw": draw}
        expected = reference_traces(net, strategy, site, *images, table[i].tolist(), **own)
        torch.testing.assert_close(seen.trace[i], expected, rtol=1e-7, atol=1e-12, equal_nan=True)


def test_pilots_have_the_widths_of_their_step(tokens_net, tokens):
    sites = [{"stages": ["0", "1"]}, {"stages": ["2", "4"]}]
    strategy = bound(tokens_net, squared_error, sites, pilots=PilotSpec("0..1", 4), token_sigma=True)
    trained(strategy, *tokens, steps=3)
    draw, counts = strategy.draw, torch.tensor([3, 0, 5, 2])
    clean = strategy.clean_pass(*tokens)
    strategy.pilot_traces(clean)
    strategy.estimate(clean, counts, sites=["0..1"])
    found = gradients(tokens_net)
    expected = reference_gradient(
        tokens_net, strategy, strategy.sites[0], *tokens, counts.tolist(), draw=draw, pilots=4
    )  # fmt: skip
    assert_entries(found, expected, rtol=1e-9, atol=1e-9)


def test_scales_weigh_tokens_as_queries_do():
    """One token trains a bias, the other nothing; of a query's squared ``delta`` the first has ``1 / r^2``."""

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(3000, dtype=torch.float64))

        def forward(self, h: Tensor) -> Tensor:
            return h + torch.stack([self.bias, torch.zeros_like(self.bias)])

    net = nn.Sequential(First(), nn.Identity())
    x = torch.randn(4, 2, 3000, dtype=torch.float64)
    strategy = bound(net, linear_loss, [{"stages": ["0"]}], token_sigma=True)
    strategy._tokens.load_state_dict({"0": vars(settled(torch.tensor([1.0, 256.0]), torch.zeros(2)))})
    clean = strategy.clean_pass(x, x)
    r = strategy.widths["0"].relative
    share = float(r[0] ** -2 / r.pow(-2).sum())
    assert strategy.site_scales(clean, None)[0] == pytest.approx(share, rel=0.06)
    assert share == pytest.approx(1 / 17, rel=1e-6)


@pytest.mark.parametrize("variant", ["plain", "baseline", "leave_one_out", "antithetic"])
def test_mean_squares_are_unbiased(variant):
    net, _, g, _ = uneven_problem(tokens=4, batch=3)
    strategy = bound(net, linear_loss, [{"stages": ["0"]}], token_sigma=True, variant=variant)
    found, counts = [], torch.tensor([40, 90, 60]).numpy()
    for _ in range(200):
        clean = strategy.clean_pass(torch.zeros_like(g), g)  # clean losses of 0, or `plain` would be noise
        found.append(strategy.engine.sums(strategy.sites[0], clean, counts).token_mean_squares(strategy.unit))
    draws, truth = torch.stack(found), g.square().sum(2)
    deviation = (draws.mean(0) - truth).abs() / (draws.std(0) / len(draws) ** 0.5)
    assert float(deviation.max()) < 4, "standard errors"


def variance(strategy: LikelihoodRatio, x: Tensor, y: Tensor, *, draws: int) -> float:
    """Sum over the parameters of the variance of the gradient estimate."""
    found = [flat(list(estimated(strategy, x, y)[1].values())) for _ in range(draws)]
    return float(torch.stack(found).var(0).sum())


def test_the_variance_falls_as_theory_says():
    """``T sum rho / (sum sqrt(rho))^2``, but for the share 1 / d that does not depend on the widths."""
    net, x, g, rho = uneven_problem()
    features = g.shape[2]
    uniform = features * len(rho) * rho.sum() + rho.sum()
    best = features * rho.sqrt().sum().square() + rho.sum()
    theory = float(uniform / best)
    assert theory > 2.5
    site = {"stages": ["0"], "queries_per_sample": 40}
    equal = variance(bound(net, linear_loss, [site]), x, g, draws=250)
    oracle = bound(net, linear_loss, [site], token_sigma=True)
    oracle._tokens.load_state_dict({"0": vars(settled(rho, torch.zeros_like(rho)))})
    oracle._tokens.observe = lambda *_: None  # the widths stay
    assert equal / variance(oracle, x, g, draws=250) == pytest.approx(theory, rel=0.06)
    learned = bound(net, linear_loss, [site], token_sigma=True)
    trained(learned, x, g, steps=3 * HALF_LIFE)
    ratio = equal / variance(learned, x, g, draws=250)
    assert 0.85 * theory < ratio < 1.06 * theory


@pytest.mark.parametrize("settings", [{"token_sigma": True}, {"learn_sigma": 0.1}], ids=["tokens", "sigma"])
def test_a_resumed_run_goes_on_alike(settings, tokens_net, tokens, tmp_path):
    sites = [{"stages": ["0", "4"], "kind": "block"}]
    strategy, resumed = (bound(tokens_net, squared_error, sites, seed=3, **settings) for _ in range(2))
    trained(strategy, *tokens, steps=4)
    torch.save(strategy.state_dict(), tmp_path / "state.pt")
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for _ in range(3):
        _, expected = estimated(strategy, *tokens)
        _, found = estimated(resumed, *tokens)
        assert_entries(found, expected)
    assert [width.sigma for width in resumed.widths.values()] == [width.sigma for width in strategy.widths.values()]
    if "token_sigma" in settings:
        assert strategy.state_dict()["token_sigma"].keys() == {"0", "2"}


def test_a_state_without_widths_starts_with_equal_ones(tokens_net, tokens):
    sites = [{"stages": ["0", "4"], "kind": "block"}]
    before = bound(tokens_net, squared_error, sites)
    estimated(before, *tokens)
    strategy = bound(tokens_net, squared_error, sites, token_sigma=True)
    trained(strategy, *tokens, steps=2)
    strategy.load_state_dict(copy.deepcopy(before.state_dict()))
    assert all(width.relative is None for width in strategy.widths.values())


def test_another_number_of_tokens_is_refused():
    tokens = TokenSigma()
    tokens.observe("body", torch.ones(2, 5))
    with pytest.raises(SettingError, match=r"token_sigma = True: site 'body' has 7 tokens, and had 5"):
        tokens.observe("body", torch.ones(2, 7))


@pytest.mark.parametrize(
    ("settings", "sites", "message"),
    [
        ({"noise": {"orthogonal": True}}, [], r"token_sigma = True: learns from products of independent queries"),
        (
            {},
            [{"stages": ["0", "4"], "kind": "linear", "together": True}],
            r"token_sigma = True: cannot be learned at '0..4'",
        ),
        (
            {"variant": "antithetic"},
            [{"stages": ["0", "4"], "kind": "block", "queries_per_sample": 2}],
            r"token_sigma = True: learns from pairs of independent queries.*Raise queries_per_sample to 4",
        ),
    ],
)
def test_settings_that_are_refused(settings, sites, message, tokens_net):
    with pytest.raises(SettingError, match=message):
        bound(tokens_net, squared_error, sites, token_sigma=True, **settings)


def test_sites_without_tokens_are_refused(tokens):
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    strategy = bound(net, squared_error, [{"stages": ["1"]}, {"stages": ["3"]}], token_sigma=True)
    with pytest.raises(SettingError, match=r"token_sigma = True: no site has more than one token. Write false"):
        strategy.clean_pass(*tokens)


def test_without_the_setting_no_square_of_a_token_is_summed(tokens_net, tokens, monkeypatch):
    made: list[DeltaSums] = []
    empty = DeltaSums.empty
    monkeypatch.setattr(site_queries.DeltaSums, "empty", lambda *a, **k: made.append(empty(*a, **k)) or made[-1])
    estimated(bound(tokens_net, squared_error, [{"stages": ["0", "4"], "kind": "block"}]), *tokens)
    assert [(sums.token_squares, sums.slopes) for sums in made] == [(None, None)] * 4
