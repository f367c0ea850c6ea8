from dataclasses import replace

import pytest
import torch

from flops_lightning.network.staging import stage_network
from flops_lightning.strategies import LikelihoodRatio
from flops_lightning.strategies.signal import SHARE, derivative_along, signal_samples
from tests.reference.networks import (
    autograd_gradient,
    cross_entropy,
    estimated,
    gradients,
    squared_error,
    tiny_vit,
    token_network,
)
from tests.reference.networks import bound_to as bound

SITES = [{"stages": ["0", "1"], "sigma": 1e-3}, {"stages": ["2", "4"], "sigma": 1e-3}]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_is_the_product_with_the_exact_gradient_and_moves_nothing(dtype: torch.dtype) -> None:
    net = tiny_vit().to(dtype).eval()
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 1, 8, 8, generator=generator).to(dtype), torch.arange(6) % 5
    exact = autograd_gradient(net, cross_entropy, x, y)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for scale in (1e-6, 1.0):
        directions = {n: scale * torch.randn(g.shape, generator=generator).to(dtype) for n, g in exact.items()}
        found = derivative_along(stage_network(net), cross_entropy, x, y, directions, rows=4)
        expected = sum((exact[n] * d).sum() for n, d in directions.items())
        assert float(found) == pytest.approx(float(expected), rel=1e-3 if dtype == torch.float64 else 2e-2)
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


def test_lost_samples_count_as_zero_and_no_direction_is_no_derivative() -> None:
    net, directions = token_network(), {}
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(4, 3, 3, generator=generator).double(), torch.zeros(4, 2).double()
    network = stage_network(net)
    for name, p in net.named_parameters():
        directions[name] = torch.randn(p.shape, generator=generator).double()
    kept = derivative_along(network, squared_error, x[:3], y[:3], directions)
    x[3] = torch.nan
    assert float(derivative_along(network, squared_error, x, y, directions)) == pytest.approx(float(kept) * 3 / 4)
    still = {name: torch.zeros_like(d) for name, d in directions.items()}
    assert float(derivative_along(network, squared_error, x, y, still)) == 0.0


def test_parts_of_the_batch_take_turns_and_their_mean_is_the_batch() -> None:
    net = token_network()
    strategy = bound(LikelihoodRatio, net, squared_error, SITES)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 3, 3, generator=generator).double(), torch.zeros(64, 2).double()
    directions = {n: torch.randn(p.shape, generator=generator).double() for n, p in net.named_parameters()}
    parts = []
    for draw in range(SHARE):
        before = strategy.meter.total().clean_passes
        parts.append(strategy.derivative_along(replace(strategy.clean_pass(x, y), draw=draw), directions))
        assert strategy.meter.total().clean_passes - before == 64 + 2 * 64 / SHARE
    whole = derivative_along(strategy.network, squared_error, x, y, directions)
    assert float(torch.stack(parts).mean()) == pytest.approx(float(whole))
    assert len({round(float(part), 9) for part in parts}) == SHARE
    for samples, expected in ((1, 1), (31, 31), (32, 16), (50, 17), (128, 32)):
        assert len(signal_samples(samples, 0)) == expected


@pytest.mark.slow
@pytest.mark.parametrize("counts", [[3, 3, 3, 3], [1, 6, 2, 3]])
def test_its_mean_along_estimates_is_the_squared_norm_of_the_exact_gradient(tokens_net, tokens, counts) -> None:
    strategy = bound(LikelihoodRatio, tokens_net, squared_error, SITES)
    exact = sum(g.square().sum() for g in autograd_gradient(tokens_net, squared_error, *tokens).values())
    along, squares, clean_passes = [], [], 0
    for _ in range(100):
        clean, gradient = estimated(strategy, *tokens, torch.tensor(counts))
        gradients(tokens_net)
        clean_passes += 3 * len(tokens[0])
        along.append(strategy.derivative_along(clean, gradient))
        squares.append(sum(g.square().sum() for g in gradient.values()))
    found = torch.stack(along) / exact
    assert abs(float(found.mean()) - 1) <= 4 * float(found.std()) / 10
    assert float(found.std()) / 10 < 0.1
    # What the estimate has more is noise.
    assert float(torch.stack(squares).mean()) > 1.5 * float(exact)
    assert strategy.meter.total().clean_passes == clean_passes
