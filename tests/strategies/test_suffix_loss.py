"""A loss that is the rest of the network: it is counted, trimmed and given memory as the network is, and left alone."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flops_lightning.allocators import CostAwareAllocator, OptimalAllocator, TraceSettings
from flops_lightning.errors import SettingError
from flops_lightning.network.memory import peak_bytes
from flops_lightning.network.rows import gather
from flops_lightning.network.staging import stage_network
from flops_lightning.queries import longest_loss
from flops_lightning.strategies import (
    SPSA,
    Backprop,
    CandidateSearch,
    CoordinateFiniteDifferences,
    EvolutionStrategies,
    ForwardMode,
    LikelihoodRatio,
    MeZO,
    WeightForwardMode,
)
from flops_lightning.suffix_loss import PaddedTargets, SuffixLoss
from tests.reference.networks import bound, bound_to, freeze, gradients, normal

LENGTHS = [3, 1, 6, 2]
LINEAR = [{"stages": ["0"], "kind": "linear", "sigma": 1e-3, "queries_per_sample": 6}]
TWO = [{"stages": ["0"], "sigma": 1e-3, "queries_per_sample": 6}, {"stages": ["2"], "sigma": 1e-3}]
NETWORK_FLOPS, TOKEN_FLOPS = 2 * (5 * 4 + 4 * 4), 2 * 4 * 4  # of one row


class Recurrence(SuffixLoss):
    """A frozen recurrence over as many tokens as the sample has: mean square of its distance from the targets."""

    differentiable = True

    def __init__(self) -> None:
        self.weight = 0.4 * normal(4, 4, seed=3)
        self.runs: list[tuple[int, int]] = []

    def __call__(self, outputs: Tensor, targets: PaddedTargets) -> Tensor:
        wanted, mask, h, total = targets.trimmed(), targets.mask(), outputs, 0.0
        self.runs.append((len(wanted), wanted.shape[1]))
        for t in range(wanted.shape[1]):
            h = torch.tanh(h @ self.weight)
            total = total + mask[:, t] * (h.sum(1) - wanted[:, t]).square()
        return total / mask.sum(1)

    def flops(self, targets: PaddedTargets) -> np.ndarray:
        return float(TOKEN_FLOPS) * targets.lengths


class BlackBox(Recurrence):
    differentiable = False


class HostTargets(PaddedTargets):
    """Refuses to ask the device for its rows."""

    def take(self, index: Tensor, samples: Any = None) -> PaddedTargets:
        assert samples is not None
        assert np.array_equal(index.numpy(), samples)
        return super().take(index, samples)


def adapter() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4)).double()


def batch(lengths: list[int] = LENGTHS, kind: type[PaddedTargets] = PaddedTargets) -> tuple[Tensor, PaddedTargets]:
    sequences = [normal(n, seed=10 + i) for i, n in enumerate(lengths)]
    padded = kind.of(sequences, padding=1e3)
    return normal(len(lengths), 5, seed=2), padded


def test_padded_targets_are_cut_to_the_rows_that_are_taken():
    _, targets = batch()
    some = gather({"nested": [targets]}, torch.tensor([3, 0]))["nested"][0]
    assert some.lengths.tolist() == [2, 3]
    assert torch.equal(some.trimmed(), targets.values[[3, 0], :3])
    assert some.mask().tolist() == [[True, True, False], [True, True, True]]
    assert some.trimmed(multiple=4).shape == (2, 4)
    assert some.trimmed(multiple=8)[:, 6:].eq(0).all()
    assert targets.length(multiple=4) == 8
    assert len(some) == 2
    assert torch.equal(targets.to(torch.float32).values, targets.values.float())


@pytest.mark.parametrize(
    ("kind", "sites", "settings"),
    [
        (LikelihoodRatio, LINEAR, {}),
        (LikelihoodRatio, TWO, {}),
        (LikelihoodRatio, TWO, {"variant": "antithetic"}),
        (EvolutionStrategies, TWO, {"layout": "factored"}),
        (SPSA, TWO, {}),
    ],
)
def test_the_estimate_is_that_of_the_whole_network(kind, sites, settings):
    """Chunk by chunk each row's loss is the one that it has alone, whatever the padding beside it."""
    x, targets = batch(kind=HostTargets)
    network = adapter()
    freeze(network, "2.weight", "2.bias") if len(sites) == 1 else None

    def whole(outputs: Tensor, which: Tensor) -> Tensor:  # one sample at a time, as an ordinary loss
        rows = [[batch()[1].take(i[None])] for i in which]
        return torch.cat([Recurrence()(out[None], *one) for out, one in zip(outputs, rows, strict=True)])

    found = []
    for loss, given in ((Recurrence(), targets), (whole, torch.arange(4))):
        strategy = bound_to(kind, network, loss, sites, chunk_rows=4, **settings)
        strategy.estimate(strategy.clean_pass(x, given))
        found.append(gradients(network))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)


def test_chunks_run_as_many_tokens_as_their_longest_sample():
    x, targets = batch([1, 2, 3, 6])
    loss = Recurrence()
    strategy = bound(adapter(), loss, [{**site, "queries_per_sample": 8} for site in TWO], chunk_rows=8)
    clean = strategy.clean_pass(x, targets)
    loss.runs.clear()
    strategy.estimate(clean)
    assert loss.runs == [(8, n) for _ in range(2) for n in (1, 2, 3, 6)]
    loss.runs.clear()
    wide = bound(adapter(), loss, TWO, chunk_rows=2)
    wide.clean_pass(x, targets)
    assert loss.runs == [(2, 2), (2, 6)]  # the clean pass too takes no more rows at once


def test_the_meter_counts_the_tokens_of_each_sample():
    """In units of network and loss at the mean length of the first batch; a later batch does not change the unit."""
    unit = NETWORK_FLOPS + TOKEN_FLOPS * sum(LENGTHS) / 4
    strategy = bound(adapter(), Recurrence(), TWO)
    counts = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    for lengths in (LENGTHS, [5, 5, 5, 2]):
        x, targets = batch(lengths)
        before = strategy.meter.state_dict()
        strategy.estimate(strategy.clean_pass(x, targets), counts)
        spent = {
            name: count.forward_equivalents - before.get(name, {"forward_equivalents": 0.0})["forward_equivalents"]
            for name, count in strategy.meter.sites.items()
        }
        tokens = torch.tensor(lengths)
        assert spent["clean"] == pytest.approx((4 * NETWORK_FLOPS + TOKEN_FLOPS * sum(lengths)) / unit)
        below = counts[0].sum() * 2 * 4 * 4 + TOKEN_FLOPS * (counts[0] * tokens).sum() + 4 * 3 * 2 * 5 * 4
        assert spent["0"] == pytest.approx(float(below) / unit)
        assert spent["2"] == pytest.approx(float(TOKEN_FLOPS * (counts[1] * tokens).sum() + 4 * 3 * 2 * 4 * 4) / unit)
    mean = sum(LENGTHS) / 4
    expected = {"0": (2 * 4 * 4 + TOKEN_FLOPS * mean) / unit, "2": TOKEN_FLOPS * mean / unit}
    assert strategy.query_costs(4) == pytest.approx(expected)  # what a plan shows


def test_a_resumed_run_counts_in_the_unit_of_the_run_that_it_continues():
    strategy, resumed = (bound(adapter(), Recurrence(), LINEAR + TWO[1:]) for _ in range(2))
    strategy.clean_pass(*batch())
    resumed.load_state_dict(strategy.state_dict())
    for each in (strategy, resumed):
        each.estimate(each.clean_pass(*batch([9, 9])))
    assert resumed.meter.state_dict() == strategy.meter.state_dict()


@pytest.mark.parametrize("settings", [{"queries": 4}, {"queries": 4, "variant": "baseline"}])
def test_whole_batches_count_it_too(settings):
    unit = NETWORK_FLOPS + TOKEN_FLOPS * sum(LENGTHS) / 4
    network = adapter()
    freeze(network, "0.weight", "0.bias")
    mezo = MeZO(seed=0, **settings)
    mezo.bind(stage_network(network), Recurrence())
    mezo.estimate(mezo.clean_pass(*batch()))
    top = 2 * 4 * 4
    cost = 4 * (4 * top + TOKEN_FLOPS * sum(LENGTHS)) / unit
    assert mezo.meter.sites["all"].forward_equivalents == pytest.approx(cost)
    whole = 4 if "variant" in settings else 4 * (NETWORK_FLOPS - top) / unit
    assert mezo.meter.sites["clean"].forward_equivalents == pytest.approx(whole)


def test_backprop_counts_one_pass_back_through_what_is_frozen():
    unit = NETWORK_FLOPS + TOKEN_FLOPS * sum(LENGTHS) / 4
    strategy = Backprop()
    strategy.bind(stage_network(adapter()), Recurrence())
    strategy.estimate(strategy.clean_pass(*batch()))
    cost = 3 * 4 * NETWORK_FLOPS + 2 * TOKEN_FLOPS * sum(LENGTHS)
    assert strategy.meter.total().forward_equivalents == pytest.approx(cost / unit)


def test_coordinates_count_it():
    strategy = CoordinateFiniteDifferences(coordinates=3, seed=0)
    network = adapter()
    freeze(network, "0.weight", "0.bias")
    strategy.bind(stage_network(network), Recurrence())
    x, targets = batch(kind=HostTargets)
    strategy.estimate(strategy.clean_pass(x, targets))
    unit = NETWORK_FLOPS + TOKEN_FLOPS * sum(LENGTHS) / 4
    cost = 3 * (4 * 2 * 4 * 4 + TOKEN_FLOPS * sum(LENGTHS)) / unit
    assert strategy.meter.sites["coordinates"].forward_equivalents == pytest.approx(cost)


def test_candidates_count_it_and_cut_it():
    network, loss = adapter(), Recurrence()
    freeze(network, "0.weight", "0.bias")
    search = CandidateSearch(search={"population": 5, "seed": 1}, chunk_rows=2)
    search.bind(stage_network(network), loss)
    clean = search.clean_pass(*batch(kind=HostTargets))
    loss.runs.clear()
    search.estimate(clean)
    assert loss.runs == 5 * [(2, 3), (2, 6)]
    unit = NETWORK_FLOPS + TOKEN_FLOPS * sum(LENGTHS) / 4
    assert search.meter.sites["clean"].forward_equivalents == pytest.approx(4)
    assert search.meter.sites["2"].forward_equivalents == pytest.approx(
        5 * (4 * 2 * 4 * 4 + TOKEN_FLOPS * sum(LENGTHS)) / unit
    )


def test_crossed_queries_would_run_it_for_every_pair():
    strategy = EvolutionStrategies(sites=TWO, variant="leave_one_out", pairing="crossed")
    with pytest.raises(SettingError, match="would run the rest of the network for every pair"):
        strategy.bind(stage_network(adapter()), Recurrence())


def test_automatic_rows_make_room_for_the_dearest_sample():
    _, targets = batch()
    loss = Recurrence()
    run = longest_loss(loss, targets)
    run(torch.zeros(3, 4, dtype=torch.float64))
    assert loss.runs == [(3, 6)]
    assert longest_loss(lambda outputs, _: outputs[:, 0], targets) is None

    class Large(Recurrence):
        def __call__(self, outputs: Tensor, targets: PaddedTargets) -> Tensor:
            outputs = outputs + outputs.new_zeros(len(outputs), 3 * 2**16).sum(1, keepdim=True)  # 1.5 MiB a row
            return super().__call__(outputs, targets)

    rows = []
    for each in (Recurrence(), Large()):
        strategy = bound(adapter(), each, TWO, chunk_rows="auto")
        strategy.clean_pass(*batch())
        rows.append(strategy.chunk_rows)
    assert rows == [1024, 16]  # 32 MiB of a CPU's cache
    assert peak_bytes(lambda: run(torch.zeros(1, 4, dtype=torch.float64))) > 0


def test_costs_of_samples_reach_the_allocator():
    """``A_sb ~ sqrt(Tr_sb / c_sb)``, at the compute that the sites' own budgets cost on this batch."""
    strategy = bound(adapter(), Recurrence(), TWO)
    clean = strategy.clean_pass(*batch())
    statistics = strategy.sample_statistics(clean, {"counted_costs", "fixed_costs"})
    assert statistics.counted_costs.shape == (2, 4)
    unit = NETWORK_FLOPS + TOKEN_FLOPS * sum(LENGTHS) / 4
    of_loss = TOKEN_FLOPS * torch.tensor(LENGTHS).double() / unit
    expected = torch.stack([of_loss + 2 * 4 * 4 / unit, of_loss])
    torch.testing.assert_close(statistics.counted_costs, expected)
    told = statistics.with_tensors({"trace": torch.ones(2, 4, dtype=torch.float64), "scale": torch.ones(2)})
    many = [{**site, "queries_per_sample": 1000} for site in TWO]
    allocator = CostAwareAllocator(traces=TraceSettings(source="pilots"), min_queries=1)
    allocation = allocator.allocate(told, bound(adapter(), Recurrence(), many).budget)
    wanted = expected.rsqrt()
    wanted = wanted * 1000 * expected.sum() / (wanted * expected).sum()
    torch.testing.assert_close(allocation.counts.double(), wanted, rtol=0.01, atol=1)
    assert allocation.diagnostics["compute_used"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("kind", [ForwardMode, WeightForwardMode])
def test_forward_mode_is_refused(kind):
    strategy = kind(sites=[{"stages": ["0", "2"], "name": "all"}])
    with pytest.raises(SettingError, match=r"would differentiate the rest of the network.*LikelihoodRatio"):
        strategy.bind(stage_network(adapter()), Recurrence())


def test_an_exact_head_is_refused():
    strategy = LikelihoodRatio(sites=TWO, exact_head=True)
    with pytest.raises(SettingError, match=r"exact_head = True: would differentiate the rest of the network"):
        strategy.bind(stage_network(adapter()), Recurrence())


def test_predictors_of_gradients_are_refused_and_those_that_need_none_are_offered():
    strategy = bound(adapter(), Recurrence(), TWO)
    clean = strategy.clean_pass(*batch())
    (names,) = [OptimalAllocator(traces=TraceSettings(source="prediction", predictors=["output_gradient"])).requests]
    with pytest.raises(SettingError, match=r"output_gradient.*would differentiate.*predictors: \[loss\]"):
        strategy.sample_statistics(clean, names)
    offered = strategy.sample_statistics(clean, OptimalAllocator().requests).predictors
    assert set(offered) == {"activation.1"}


def test_backprop_alone_differentiates_it_and_only_where_it_can():
    x, targets = batch()
    network, loss = adapter(), Recurrence()
    strategy = Backprop()
    strategy.bind(stage_network(network), loss)
    strategy.estimate(strategy.clean_pass(x, targets))
    found = gradients(network)
    exact = torch.autograd.grad(loss(network(x), targets).mean(), list(network.parameters()))
    torch.testing.assert_close(list(found.values()), list(exact))
    with pytest.raises(SettingError, match=r"BlackBox.*has no derivative"):
        Backprop().bind(stage_network(network), BlackBox())


def test_a_loss_without_a_compiled_form_says_so():
    strategy = LikelihoodRatio(sites=TWO, compile_suffixes=True)
    with pytest.raises(SettingError, match="Recurrence has no compiled form"):
        strategy.bind(stage_network(adapter()), Recurrence())
