"""What a strategy tells an allocator: what was asked for, and nothing beyond."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flops_lightning.allocators import QueryBudget, SampleStatistics
from flops_lightning.strategies import PilotSpec
from tests.reference.footprint import everything
from tests.reference.networks import bound, gradients, squared_error

SITES = [{"stages": ["0", "1"], "queries_per_sample": 10}, {"stages": ["2", "3"], "queries_per_sample": 8}]
SITES_AND_HEAD = [*SITES, {"stages": ["4"], "queries_per_sample": 6}]
ALL = frozenset({"predictors", "counted_costs", "measured_costs", "scale", "preconditioned_scale"})
GIVEN = {"loss", "embedding", "pilots_reused", "budget"}
"""Fields that cost nothing."""


def filled(statistics: SampleStatistics) -> set[str]:
    return {name for name, value in vars(statistics).items() if value is not None}


@contextmanager
def calls_counted(net: nn.Sequential) -> Iterator[list[str]]:
    """Names of the stages that run while the context lasts."""
    calls: list[str] = []
    handles = [
        stage.register_forward_hook(lambda *_, name=name: calls.append(name)) for name, stage in net.named_children()
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize(
    ("names", "fields", "ran"),
    [
        (set(), set(), []),
        ({"observation", "loss", "embedding", "trace", "trace_queries"}, set(), []),
        ({"counted_costs"}, {"counted_costs"}, []),
        ({"predictors.output_gradient"}, {"predictors"}, []),
        ({"predictors.activation"}, {"predictors"}, []),
        ({"predictors.head_gradient"}, {"predictors"}, ["4"]),
        ({"predictors.head_gradient", "predictors.top_gradient"}, {"predictors"}, ["4", "4"]),
        ({"predictors"}, {"predictors"}, ["4", "4"]),
        ({"predictors.unheard_of"}, set(), []),
    ],
)
def test_what_was_not_asked_for_is_not_computed(names, fields, ran, tokens_net, tokens):
    """Once the requests are known, that is from the second batch on: only the head runs, once for each gradient."""
    strategy = bound(tokens_net, squared_error, SITES_AND_HEAD)
    strategy.sample_statistics(strategy.clean_pass(*tokens), names)
    clean = strategy.clean_pass(*tokens)
    before = strategy.meter.total()
    with calls_counted(tokens_net) as calls:
        statistics = strategy.sample_statistics(clean, names)
    assert filled(statistics) == GIVEN | fields
    assert calls == ran
    assert strategy.meter.total() == before, "no queries, and no forward pass"
    asked = {name.removeprefix("predictors.") for name in names if name.startswith("predictors.")}
    if fields == {"predictors"} and asked:
        assert {name.split(".")[0] for name in statistics.predictors} == asked
    torch.testing.assert_close(statistics.loss, clean.loss, rtol=0, atol=0)
    torch.testing.assert_close(statistics.embedding, clean.embedding, rtol=0, atol=0)
    assert statistics.budget == QueryBudget((10, 8, 6))


@pytest.mark.parametrize(
    ("names", "kept"),
    [
        (set(), {0, 2, 5}),
        ({"predictors.output_gradient", "predictors.activation", "counted_costs", "scale"}, {0, 2, 5}),
        ({"predictors.head_gradient"}, {0, 2, 4, 5}),
        ({"predictors"}, {0, 2, 4, 5}),
    ],
)
def test_what_was_not_asked_for_is_not_kept(names, kept, tokens_net, tokens):
    """Of the clean pass: what sites start from, the output, and what the requested predictors start from."""
    sites = [SITES[0], {"stages": ["2", "4"], "queries_per_sample": 8}]
    strategy = bound(tokens_net, squared_error, sites)
    for _ in range(2):
        clean = strategy.clean_pass(*tokens)
        strategy.sample_statistics(clean, names)
    assert set(clean.activations) == kept
    strategy.sample_statistics(clean, set())
    assert set(strategy.clean_pass(*tokens).activations) == {0, 2, 5}, "no longer asked for, no longer kept"


def test_the_input_is_kept_by_reference(tokens_net, tokens):
    """What the first batch did not keep can be run again from it, and it takes no memory of its own."""
    strategy = bound(tokens_net, squared_error, [SITES[0], {"stages": ["2", "4"]}])
    assert strategy.clean_pass(*tokens).activations[0] is tokens[0], "a site that starts there runs on copies"
    tokens_net[:4].requires_grad_(False)
    clean = (top := bound(tokens_net, squared_error, [{"stages": ["4"]}])).clean_pass(*tokens)
    assert set(clean.activations) == {0, 4, 5}
    assert clean.activations[0] is tokens[0]
    assert set(top.refresh(clean, ["4"]).activations) == {0, 4, 5}


def test_what_has_to_run_again_is_paid(tokens_net, tokens):
    """On the first batch, whose clean pass came before the request, from the highest activation that was kept."""
    strategy = bound(tokens_net, squared_error, [SITES[0], {"stages": ["2", "4"]}], chunk_rows=3)
    clean = strategy.clean_pass(*tokens)
    before = strategy.meter.total().forward_equivalents
    with calls_counted(tokens_net) as calls:
        strategy.sample_statistics(clean, {"predictors.head_gradient"})
    assert calls == ["2", "3", "4"] * 2 + ["4"], "a chunk of 3 samples and one of 1, and the gradient"
    linear = {"0": 3 * 3 * 4, "2": 3 * 4 * 3, "4": 3 * 2}  # multiplications of a sample: tokens, inputs, outputs
    share = (linear["2"] + linear["4"]) / sum(linear.values())
    assert strategy.meter.total().forward_equivalents - before == pytest.approx(4 * share)


@pytest.mark.parametrize("reuse", [True, False])
def test_pilots(reuse, tokens_net, tokens):
    pilots = PilotSpec(["deepest", "0..1"], 4, reuse=reuse)
    strategy, other = (bound(tokens_net, squared_error, SITES_AND_HEAD, pilots=pilots) for _ in range(2))
    statistics = strategy.sample_statistics(strategy.clean_pass(*tokens))
    seen = other.pilot_traces(other.clean_pass(*tokens))
    torch.testing.assert_close(statistics.trace, seen.trace, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(statistics.trace_queries, seen.queries)
    assert filled(statistics) == GIVEN | {"trace", "trace_queries"}
    assert statistics.pilots_reused is reuse
    assert statistics.budget == QueryBudget((6, 8, 2))
    assert strategy.meter.total().pilots == 2 * 4 * 4


@pytest.mark.parametrize("names", [ALL, frozenset()])
def test_the_network_is_left_as_it_was(names, tokens_net, tokens):
    tokens_net.append(nn.Dropout(0.5))
    tokens_net.train()
    tokens_net[3].eval()
    tokens_net[2].register_forward_hook(lambda *_: None)
    sites = [*SITES, {"stages": ["4", "5"], "kind": "linear"}]
    strategy = bound(tokens_net, squared_error, sites, pilots=PilotSpec("lowest", 2))
    metric = {name: torch.ones_like(p) for name, p in tokens_net.named_parameters()}
    before: dict[str, Any] = everything(tokens_net)
    statistics = strategy.sample_statistics(strategy.clean_pass(*tokens), names, metric)
    assert everything(tokens_net) == before
    assert set(gradients(tokens_net).values()) == {None}
    assert filled(statistics) == GIVEN | {"trace", "trace_queries"} | names
    for value in [*vars(statistics).values(), *(statistics.predictors or {}).values()]:
        assert not (isinstance(value, Tensor) and value.requires_grad)
