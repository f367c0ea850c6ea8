"""What is paid, against totals computed by hand."""

import pytest
import torch
from torch import Tensor, nn

from flops_lightning.meter import QueryMeter, SiteCount
from flops_lightning.strategies import PilotSpec
from tests.reference.networks import bound, cross_entropy, shaken, squared_error, tiny_vit

LOWER, UPPER = 24 / 40, 16 / 40
"""Shares of the two layers of `two_layers` in a forward pass: 2 * 3 * 4 and 2 * 4 * 2 operations."""


@pytest.fixture
def two_layers() -> nn.Module:
    return shaken(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return torch.ones(4, 3, dtype=torch.float64), torch.zeros(4, 2, dtype=torch.float64)


def test_totals_and_a_restored_meter_goes_on_counting():
    meter, restored = QueryMeter(), QueryMeter()
    meter.add("a", queries=5, pilots=2, lost=1, forward_equivalents=0.5)
    meter.add("b", queries=3, clean_passes=4)
    state = meter.state_dict()
    meter.add("a", queries=1, forward_equivalents=0.25)
    assert meter.sites == {"a": SiteCount(6, 2, 1, 0, 0.75), "b": SiteCount(3, 0, 0, 4, 0.0)}
    assert meter.total() == SiteCount(9, 2, 1, 4, 0.75)
    assert QueryMeter().total() == SiteCount()
    restored.add("gone", queries=7)
    restored.load_state_dict(state)
    restored.add("a", queries=2)
    assert restored.sites == {"a": SiteCount(7, 2, 1, 0, 0.5), "b": SiteCount(3, 0, 0, 4, 0.0)}
    assert state["a"] == {"queries": 5, "pilots": 2, "lost": 1, "clean_passes": 0, "forward_equivalents": 0.5}


@pytest.mark.parametrize(
    ("sites", "costs"),
    [
        # Queries pay the suffix; the local VJP three times the forward pass of what it spans, once a sample.
        ([{"stages": ["0", "1"]}, {"stages": ["2"]}], {"0..1": (UPPER, 3 * LOWER), "2": (0.0, 3 * UPPER)}),
        # One layer at a time: a query starts at the layer's stage, and its input is fetched once a sample.
        ([{"stages": ["0", "2"], "kind": "linear"}], {"0": (1.0, LOWER), "2": (UPPER, UPPER)}),
        # Together: each row's own closed form costs as much as the layers themselves.
        ([{"stages": ["0", "2"], "kind": "linear", "together": True}], {"0..2": (2.0, 0.0)}),
    ],
)
def test_forward_equivalents(sites, costs, two_layers, batch):
    strategy = bound(two_layers, squared_error, sites, chunk_rows=4)
    counts = torch.tensor([3, 0, 5, 2])
    for _ in range(2):
        strategy.estimate(strategy.clean_pass(*batch), counts)
    clean = strategy.meter.sites.pop("clean")
    assert clean == SiteCount(clean_passes=8, forward_equivalents=8.0)
    assert set(strategy.meter.sites) == set(costs)
    for name, (query, gradient) in costs.items():
        count = strategy.meter.sites[name]
        assert (count.queries, count.pilots, count.lost, count.clean_passes) == (20, 0, 0, 0)
        assert count.forward_equivalents == pytest.approx(20 * query + 8 * gradient)


def test_pilots(two_layers, batch):
    sites = [{"stages": ["0", "1"], "queries_per_sample": 10}, {"stages": ["2"]}]
    strategy = bound(two_layers, squared_error, sites, pilots=PilotSpec("0..1", 4))
    clean = strategy.clean_pass(*batch)
    strategy.pilot_traces(clean)
    assert strategy.meter.sites["0..1"] == SiteCount(16, 16, 0, 0, pytest.approx(16 * UPPER))
    strategy.estimate(clean)
    assert strategy.meter.sites["0..1"] == SiteCount(40, 16, 0, 0, pytest.approx(40 * UPPER + 4 * 3 * LOWER))


def test_a_refreshed_pass_costs_its_suffix(two_layers, batch):
    strategy = bound(two_layers, squared_error, [{"stages": ["0", "1"]}, {"stages": ["2"]}], update="site_by_site")
    clean = strategy.clean_pass(*batch)
    strategy.refresh(clean, ["2"])
    assert strategy.meter.sites["clean"] == SiteCount(0, 0, 0, 4, pytest.approx(4 + 4 * UPPER))


def test_queries_on_the_class_token_alone_are_nearly_free(images):
    """Operations counted by hand: 5 tokens of 16 features, 2 heads, an MLP of 64, 5 classes."""
    vit = tiny_vit()
    embed = 2 * (4 * 16) * 16
    attention = 2 * (2 * 5 * 5 * 16)
    block = 2 * 5 * 16 * 48 + attention + 2 * 5 * 16 * 16 + 2 * (2 * 5 * 16 * 64)
    head = 2 * 16 * 5
    # Of the last block the class token alone is read: all keys and values, and the rest for one token of five.
    last = 2 * 5 * 16 * 48 + attention / 5 + 2 * 16 * 16 + 2 * (2 * 16 * 64)
    full = embed + 2 * block + last + head
    strategy = bound(vit, cross_entropy, [{"stages": ["embed", "head"], "kind": "block"}])
    strategy.estimate(strategy.clean_pass(*images), torch.tensor([1, 0, 0, 0]))
    found = {name: count.forward_equivalents for name, count in strategy.meter.sites.items()}
    vjp = {"embed": embed, "blocks.0": block, "blocks.1": block, "blocks.2": last, "pool": 0, "head": head}
    suffix = {"embed": full - embed, "blocks.0": block + last + head, "blocks.1": last + head, "blocks.2": head,
              "pool": head, "head": 0}  # fmt: skip
    for name, operations in suffix.items():
        assert found[name] == pytest.approx((operations + 4 * 3 * vjp[name]) / full), name


def test_a_network_without_products_counts_its_stages(batch):
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * x

    net = nn.Sequential(Scale(), nn.Tanh(), Scale(), nn.Tanh())
    strategy = bound(net, squared_error, [{"stages": ["0"]}, {"stages": ["1", "3"]}])
    strategy.estimate(strategy.clean_pass(batch[0], batch[0]), torch.tensor([2, 2, 2, 2]))
    assert strategy.meter.sites["0"].forward_equivalents == pytest.approx(8 * 3 / 4 + 4 * 3 / 4)
