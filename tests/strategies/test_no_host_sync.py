"""Queries never wait for a number of the device: inside the loop over chunks no tensor becomes a Python number."""

from functools import partial
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from flops_lightning.network.staging import stage_network
from flops_lightning.strategies import SPSA, EvolutionStrategies, ForwardMode, LikelihoodRatio
from flops_lightning.strategies.delta import Variant
from tests.reference.networks import tiny_vit

WAITING = ("aten._local_scalar_dense", "aten.nonzero", "aten.item", "aten.masked_select", "aten.is_nonzero")
SITES = [
    {"name": "lower", "stages": ["embed", "blocks.1"], "sigma": 0.05, "queries_per_sample": 4},
    {"name": "upper", "stages": ["blocks.2"], "sigma": 0.05, "queries_per_sample": 4},
    {"name": "head", "stages": ["pool", "head"], "sigma": 0.05, "queries_per_sample": 4},
]


class NoWaiting(TorchDispatchMode):
    """Refuses what would copy to the host and wait, or whose result's shape only the device knows."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(str(func).startswith(name) for name in WAITING):
            raise AssertionError(f"{func} waits for the device")
        if str(func).startswith("aten.index.Tensor") and any(i is not None and i.dtype == torch.bool for i in args[1]):
            raise AssertionError("indexing by a mask waits for the device")
        return func(*args, **(kwargs or {}))


def row_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(outputs, targets, reduction="none")


def test_the_guard_refuses_what_waits():
    x = torch.arange(3.0)
    for wait in (lambda: x.sum().item(), lambda: x[x > 1], x.nonzero, lambda: bool(x.any())):
        with pytest.raises(AssertionError, match="waits for the device"), NoWaiting():
            wait()


STRATEGIES = {
    **{v: partial(LikelihoodRatio, sites=SITES, variant=v, chunk_rows=4) for v in get_args(Variant)},
    "learned widths": partial(LikelihoodRatio, sites=SITES, token_sigma=True, learn_sigma=0.01, chunk_rows=3),
    "blocks": partial(LikelihoodRatio, sites=[{**SITES[0], "kind": "block"}, *SITES[1:]], chunk_rows=3),
    "forward mode": partial(ForwardMode, sites=[{**site, "sigma": 1.0} for site in SITES], chunk_rows=3),
    "ES": partial(EvolutionStrategies, sites=SITES, layout="factored", chunk_rows=3),
    "SPSA, factored": partial(SPSA, sites=SITES, layout="factored", chunk_rows=4),
    "SPSA, shared": partial(SPSA, sites=SITES, layout="shared", chunk_rows=4),
}


@pytest.mark.filterwarnings("ignore:.*derivatives are exact:UserWarning")
@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("traces", [False, True])
def test_no_number_is_waited_for_while_queries_run(name, traces):
    strategy: Any = STRATEGIES[name](seed=0)
    torch.manual_seed(0)
    network = stage_network(tiny_vit())
    strategy.bind(network, row_loss)
    clean = strategy.clean_pass(torch.randn(3, 1, 8, 8, dtype=torch.float64), torch.tensor([1, 0, 4]))
    strategy.estimate(clean, None)  # what is looked at once, before the first queries
    clean = strategy.clean_pass(torch.randn(3, 1, 8, 8, dtype=torch.float64), torch.tensor([1, 0, 4]))
    with torch.no_grad(), network.evaluating():
        for site in strategy.sites:
            engine = strategy.engine
            with NoWaiting():
                assert engine.query(site, clean, np.array([4, 4, 4]), traces=traces) is not None
