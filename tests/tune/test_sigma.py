import subprocess
import sys

import pytest
import torch
from torch import nn

from flops_lightning import LikelihoodRatio, SiteSpec, stage_network
from flops_lightning.errors import SettingError
from flops_lightning.objectives import cross_entropy, zero_one_error
from flops_lightning.strategies import SPSA, Backprop, ForwardMode, MeZO
from flops_lightning.tune.sigma import chosen, find_sigmas

SITES = [SiteSpec(["0", "2"], queries_per_sample=8, name="body"), SiteSpec(["3"], queries_per_sample=8, name="head")]


def problem(seed: int = 0):
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.LayerNorm(32), nn.Linear(32, 5))
    staged = stage_network(network)
    batches = [(torch.randn(32, 8), torch.randint(5, (32,))) for _ in range(3)]
    return staged, batches


def bound(strategy, staged, loss=cross_entropy):
    strategy.bind(staged, loss)
    return strategy


def gradients(strategy, staged, batch):
    staged.module.zero_grad()
    strategy.estimate(strategy.clean_pass(*batch))
    return {name: p.grad.flatten().double() for name, p in staged.trainable().items()}


def true_cosines(strategy, staged, batches) -> dict[str, float]:
    """Mean cosines of the estimate at each site with the gradient by backprop, on the same noise for every width."""
    found = {site.name: [] for site in strategy.sites}
    for i, batch in enumerate(batches):
        exact = gradients(bound(Backprop(), staged), staged, batch)
        for draw in range(2):
            strategy.draw = 100 * i + draw
            own = gradients(strategy, staged, batch)
            for site in strategy.sites:
                a, b = (torch.cat([each[name] for name in site.parameters]) for each in (own, exact))
                found[site.name].append(torch.cosine_similarity(a, b, dim=0))
    return {name: float(torch.stack(each).mean()) for name, each in found.items()}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_widths_found_reach_nine_tenths_of_the_best_true_cosine_in_any_precision(precision):
    staged, batches = problem()
    strategy = bound(LikelihoodRatio(sites=SITES, seed=1), staged)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        searches = find_sigmas(strategy, batches)
        columns = []
        for widths in zip(*(search.sigmas for search in searches.values()), strict=True):
            strategy.set_sigmas(dict(zip(searches, widths, strict=True)))
            columns.append(true_cosines(strategy, staged, batches))
        for name, search in searches.items():
            cosines = [column[name] for column in columns]
            assert cosines[search.sigmas.index(search.found)] >= 0.9 * max(cosines)
            assert search.least < search.found < search.sigmas[-1]
    assert (searches["body"].least > 1e-3) == (precision == "bfloat16")


@pytest.mark.parametrize(
    "make",
    [
        lambda: SPSA(sites=SITES, sigma=0.5, seed=0),
        lambda: SPSA(sites=SITES, layout="factored", sigma=0.5, seed=0),
        lambda: MeZO(sigma=0.5, seed=0),
    ],
    ids=["SPSA", "SPSA, factored", "MeZO"],
)
def test_too_wide_noise_in_parameters_is_found_out_where_halves_are_too_noisy_to_tell(make):
    staged, batches = problem()
    search, *_ = find_sigmas(bound(make(), staged), batches, widths=6).values()
    assert search.given == 0.5
    assert search.least < search.found < 0.02
    assert search.agreement[search.sigmas.index(search.found)] > 0.99
    assert search.given_agreement < 0.9


def test_a_loss_without_a_derivative_gets_noise_that_changes_predictions():
    staged, batches = problem()
    narrow, wide = (
        find_sigmas(bound(LikelihoodRatio(sites=SITES, seed=0), staged, loss), batches)["body"]
        for loss in (cross_entropy, zero_one_error)
    )
    assert narrow.found < 0.01
    assert wide.found > 0.1
    assert wide.found_halves > 0.05
    assert wide.halves[0] == 0  # no prediction changes: an estimate of zero


def test_neither_the_strategy_nor_gradients_change_and_the_search_repeats_itself():
    staged, batches = problem()
    strategy = bound(LikelihoodRatio(sites=SITES, seed=0, learn_sigma=0.1), staged)
    gradients(strategy, staged, batches[0])
    before, kept = strategy.state_dict(), [p.grad.clone() for p in staged.module.parameters()]
    weights = [p.clone() for p in staged.module.parameters()]
    first, again = (find_sigmas(strategy, batches, widths=4) for _ in range(2))
    assert first == again
    assert strategy.state_dict() == before
    assert strategy.sigmas == {"body": 0.01, "head": 0.01}
    for p, gradient, weight in zip(staged.module.parameters(), kept, weights, strict=True):
        assert torch.equal(p.grad, gradient)
        assert torch.equal(p, weight)


def test_widths_that_are_set_are_those_of_the_next_estimate():
    staged, (batch, *_) = problem()
    strategy, fresh = (
        bound(LikelihoodRatio(sites=[SiteSpec(s.stages, sigma=w, name=s.name) for s in SITES], seed=0), staged)
        for w in (0.3, 0.02)
    )
    strategy.set_sigmas({"body": 0.02, "head": 0.02})
    own, expected = (gradients(each, staged, batch) for each in (strategy, fresh))
    assert all(torch.equal(own[name], expected[name]) for name in own)
    mezo = bound(MeZO(sigma=1.0, seed=0), staged)
    mezo.set_sigmas({"all": 1e-3})
    own, expected = gradients(mezo, staged, batch), gradients(bound(MeZO(sigma=1e-3, seed=0), staged), staged, batch)
    assert all(torch.equal(own[name], expected[name]) for name in own)


def test_strategies_without_a_width_have_nothing_to_find():
    staged, batches = problem()
    for strategy in (Backprop(), ForwardMode(sites=[SiteSpec(s.stages) for s in SITES])):
        assert find_sigmas(bound(strategy, staged), batches) == {}


def test_widths_that_agree_because_noise_drowns_everything_are_out():
    """Halves tell the true range from one at the wide end; an edge has one neighbour only."""
    halves = torch.tensor([0.50, 0.50, 0.50, 0.45, 0.20, 0.05, 0.05, 0.05])
    agreement = torch.tensor([1.0, 0.97, 0.95, 0.60, 0.50, 0.60, 1.0, 1.0])
    small = torch.full_like(halves, 0.01)
    assert chosen(halves, agreement, small) == 1
    assert chosen(halves, agreement, torch.full_like(halves, 0.5)) == 6  # halves that tell nothing
    assert chosen(halves, agreement / 2, 4 * small) == 3  # none agrees: the widest of the best
    rising = torch.tensor([0.0, 0.0, 0.0, 0.1, 0.2, 0.31, 0.3, 0.1])
    assert chosen(rising, agreement / 2, small) == 6


def test_noise_above_an_embedding_is_not_measured_in_token_ids():
    torch.manual_seed(0)
    lowest = nn.Sequential(nn.Embedding(9000, 6).requires_grad_(False), nn.Flatten(), nn.Linear(12, 6))
    staged = stage_network(nn.Sequential(lowest, nn.Tanh(), nn.Linear(6, 5)))
    strategy = LikelihoodRatio(sites=[SiteSpec(["0", "2"], kind="linear")], seed=0)
    batch = (torch.randint(8000, 9000, (16, 2)), torch.randint(5, (16,)))
    found = find_sigmas(bound(strategy, staged), [batch], widths=5)
    assert list(found) == ["0.2", "2"]
    assert all(1e-5 <= search.found < 1 for search in found.values())
    assert found["0.2"].least == 0  # nothing is known of what enters the layer itself


def test_two_widths_and_no_batch_are_refused():
    staged, batches = problem()
    strategy = bound(MeZO(seed=0), staged)
    with pytest.raises(SettingError, match=r"widths = 2: must be 3 or more"):
        find_sigmas(strategy, batches, widths=2)
    with pytest.raises(SettingError, match=r"batches = 0: must be 1 or more"):
        find_sigmas(strategy, [])


def test_the_search_for_widths_loads_no_lightning():
    code = "import sys, flops_lightning.tune.sigma; print('lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
