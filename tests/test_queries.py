"""The query engine: rows and chunks, the clean pass, and estimates that depend on neither."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from flops_lightning.errors import SettingError
from flops_lightning.network.staging import stage_network
from flops_lightning.queries import clean_pass, plan_rows, refresh, row_losses
from tests.reference.layouts import VIT_SITES, vit_for
from tests.reference.networks import bound, cross_entropy, estimated, shaken, squared_error

COUNTS = st.lists(st.integers(0, 30), min_size=0, max_size=12)


def rows_of(counts: list[int], first: int = 0) -> list[tuple[int, int]]:
    return [(b, q) for b, count in enumerate(counts) for q in range(first, first + count)]


@given(counts=COUNTS, max_rows=st.integers(2, 40), first=st.integers(0, 9), multiple=st.sampled_from([1, 2]))
def test_every_row_runs_once(counts, max_rows, first, multiple):
    counts = [multiple * count for count in counts]
    first *= multiple
    chunks = list(plan_rows(np.array(counts, dtype=np.int64), max_rows, first_query=first, multiple=multiple))
    rows = [
        (int(b), int(q))
        for chunk in chunks
        for b, q in zip(chunk.samples[: chunk.rows], chunk.queries[: chunk.rows], strict=True)
    ]
    assert rows == rows_of(counts, first)
    sizes = {len(chunk.samples) for chunk in chunks} | {len(chunk.queries) for chunk in chunks}
    assert len(sizes) <= 1, "chunks have one shape"
    assert all(size <= max_rows and size % multiple == 0 for size in sizes)
    fewest = -(-sum(counts) // (max_rows // multiple * multiple))
    assert len(chunks) == fewest
    padding = sum(sizes) * len(chunks) - len(rows)
    assert padding < multiple * max(len(chunks), 1), "a smaller chunk would do"
    for chunk in chunks:
        assert 0 < chunk.rows <= len(chunk.samples)
        assert (np.diff(chunk.samples) >= 0).all()
        assert chunk.span == slice(chunk.samples.min(), chunk.samples.max() + 1)
        # Padding repeats a real row: it costs time and can neither fail nor touch another sample.
        assert (chunk.samples[chunk.rows :] == chunk.samples[chunk.rows - 1]).all()
        pairs = list(zip(chunk.samples.tolist(), (chunk.queries // 2).tolist(), strict=True))
        if multiple == 2:
            assert pairs[::2] == pairs[1::2], "a pair was torn apart"


@given(counts=st.lists(st.integers(0, 30), min_size=2, max_size=8), order=st.randoms(use_true_random=False))
def test_a_fixed_budget_gives_a_fixed_shape(counts, order):
    plans = [plan_rows(np.array(c, dtype=np.int64), 16) for c in (counts, order.sample(counts, len(counts)))]
    assert plans[0].chunk_rows == plans[1].chunk_rows
    assert len(list(plans[0])) == len(list(plans[1]))


# The clean pass


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_the_clean_pass_keeps_what_was_asked_for(rows, vit, images):
    x, y = images
    network = stage_network(vit)
    clean = clean_pass(network, cross_entropy, x, y, keep={0, 2}, draw=4, rows=rows)
    vit.eval()
    assert set(clean.activations) == {0, 2, len(network)}
    torch.testing.assert_close(clean.activations[2], network.run(x, 0, 2))
    torch.testing.assert_close(clean.output, vit(x))
    torch.testing.assert_close(clean.loss, cross_entropy(vit(x), y))
    torch.testing.assert_close(clean.embedding, vit.forward_head(vit.forward_features(x), pre_logits=True))
    assert (clean.draw, clean.batch_size) == (4, 4)
    assert not clean.loss.requires_grad


def test_the_clean_pass_survives_stages_that_work_in_place(tokens):
    x, y = tokens
    net = shaken(nn.Sequential(nn.Flatten(), nn.Linear(9, 4), nn.SiLU(inplace=True), nn.Linear(4, 2)))
    clean = clean_pass(stage_network(net), squared_error, x, y, keep={1, 2, 3}, draw=0, rows=4)
    torch.testing.assert_close(clean.activations[2], net[1](x.flatten(1)))
    torch.testing.assert_close(clean.activations[3], net[:3](x))


def test_a_refreshed_pass_equals_a_fresh_one(vit, images):
    x, y = images
    network = stage_network(vit)
    clean = clean_pass(network, cross_entropy, x, y, keep={0, 1, 3}, draw=2, rows=3)
    with torch.no_grad():
        for parameter in [*vit.blocks[2].parameters(), *vit.head.parameters()]:
            parameter.mul_(1.1)
    refreshed = refresh(network, cross_entropy, clean, 3, rows=3)
    fresh = clean_pass(network, cross_entropy, x, y, keep={0, 1, 3}, draw=2, rows=3)
    assert not torch.allclose(fresh.loss, clean.loss)
    torch.testing.assert_close(refreshed.loss, fresh.loss)
    torch.testing.assert_close(refreshed.output, fresh.output)
    torch.testing.assert_close(refreshed.embedding, fresh.embedding)
    assert {i for i in refreshed.activations if i <= 3} == {0, 1, 3}
    for i, h in refreshed.activations.items():
        torch.testing.assert_close(h, fresh.activations[i])
    assert refreshed.draw == 2


@pytest.mark.parametrize(
    "loss",
    [lambda o, t: squared_error(o, t).mean(), lambda o, t: (o - t).square(), lambda o, t: squared_error(o, t)[:-1]],
)
def test_a_loss_that_is_not_one_per_row_is_refused(loss):
    with pytest.raises(SettingError, match=r"one loss a row.*reduction='none'"):
        row_losses(loss, torch.zeros(5, 2), torch.zeros(5, 2))


# Estimates


CASES = [
    (variant, layout)
    for variant in ("plain", "baseline", "leave_one_out", "antithetic")
    for layout in ("group", "linear", "together")
    if (variant, layout) != ("leave_one_out", "together")
]


@pytest.mark.parametrize(("variant", "layout"), CASES)
def test_a_sample_is_served_the_same_in_any_company(variant, layout, images):
    """The estimate is the sum of what the samples get when all others get no query."""
    vit = vit_for(layout)
    strategy = bound(vit, cross_entropy, VIT_SITES[layout], variant=variant, chunk_rows=5)
    clean = strategy.clean_pass(*images)

    def estimate(counts: Tensor) -> dict[str, Tensor]:
        vit.zero_grad()
        strategy.estimate(clean, counts)
        return {name: p.grad for name, p in vit.named_parameters() if p.grad is not None}

    counts = torch.tensor([4, 0, 6, 2])
    whole = estimate(counts)
    parts = [estimate(counts * (torch.arange(4) == b)) for b in (0, 2, 3)]
    for name, gradient in whole.items():
        torch.testing.assert_close(gradient, sum(part[name] for part in parts), rtol=1e-10, atol=1e-10)


def test_noise_goes_with_the_place_in_the_batch(vit, images):
    """Two copies of one sample get noise of their own, so a batch of copies is not one sample many times."""
    x, y = images
    sites = VIT_SITES["group"]
    twice = bound(vit, cross_entropy, sites)
    _, both = estimated(twice, x[:1].repeat(2, 1, 1, 1), y[:1].repeat(2), torch.tensor([4, 4]))
    _, first = estimated(bound(vit, cross_entropy, sites), x[:1], y[:1], torch.tensor([4]))
    assert not torch.allclose(both["head.weight"], first["head.weight"], rtol=1e-3)
