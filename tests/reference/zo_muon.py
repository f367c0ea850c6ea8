"""One update of ZO-Muon (arXiv 2602.17155, algorithm 1), as slowly and obviously as possible."""

from typing import Any

import torch
from torch import Tensor, nn

from flops_lightning.optim.muon import hidden_matrices
from tests.reference.networks import call
from tests.reference.orthogonal import orthogonalised
from tests.reference.parameter_perturbation import basis_of, direction_of


def updated(module: nn.Module, strategy: Any, x: Tensor, y: Tensor, *, lr: float, queries: int) -> dict[str, Tensor]:
    """All parameters after one update, of one site that is the whole network, from the strategy's directions.

    A matrix ``W`` moves by ``-lr P newton_schulz(M)`` with ``M = 1/Q sum_q (L(W + sigma P U_q) - L(W)) / sigma U_q``,
    ``L`` the mean loss of the batch. Other parameters take AdamW's first step, ``-lr g / (|g| + 1e-8)``, where the
    authors' code takes ``-1e-4 g``.
    """
    (site,) = strategy.sites
    parameters = dict(module.eval().named_parameters())

    def mean_loss(moved: dict[str, Tensor]) -> float:
        with torch.no_grad():
            return float(strategy.loss(call(module, x, {**parameters, **moved}), y).mean())

    clean = mean_loss({})
    directions = [direction_of(module, strategy, site, x, 0, q, strategy.draw) for q in range(queries)]
    slopes = [
        (mean_loss({name: parameters[name] + site.sigma * d[name] for name in d}) - clean) / site.sigma
        for d in directions
    ]
    matrices = {id(p) for p in hidden_matrices(module)}
    found = {}
    for name, p in parameters.items():
        total = sum(
            slope * d[name].flatten(1 if p.ndim > 1 else 0) for slope, d in zip(slopes, directions, strict=True)
        )
        gradient = total / queries
        if id(p) in matrices:
            basis = basis_of(strategy, name, p, strategy.draw)
            step = basis @ orthogonalised(basis.mT @ gradient, 5)
        else:
            step = gradient / (gradient.abs() + 1e-8)
        found[name] = p.detach() - lr * step.view(p.shape)
    return found
