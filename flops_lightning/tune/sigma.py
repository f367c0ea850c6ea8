"""Which width of the noise is right at each site; no Lightning here.

All widths of a grid estimate the gradient of the same batches from the same noise, so that differences between the
estimates ``g`` are due to the width alone. Where the loss is linear over the noise, ``g`` does not depend on the width:
two neighbours of the grid agree, their cosine is 1. Rounding disturbs narrow noise, independently at each width;
curvature disturbs wide noise. The disagreement ``1 - cos`` with both neighbours is therefore about ``(r / sigma)^2 + (c
sigma)^2``, and least as far from both limits as one can be. That width is chosen.

Agreement alone could be that of estimates which are all wrong: noise so wide that it drowns the activation is the same
at any width. Hence a second figure, the cosine between estimates from *independent halves* of the queries: widths whose
halves agree less than the best width's, by more than two standard errors, are out. For a loss without a derivative (the
0-1 error) no two widths agree, and the halves decide alone.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flops_lightning.errors import check_at_least
from flops_lightning.meter import QueryMeter
from flops_lightning.queries import CleanPass
from flops_lightning.strategies.base import ForwardGradientStrategy
from flops_lightning.strategies.precision import least_sigma, perturbed_values, rounded_up
from flops_lightning.strategies.sites import Site

DECADES = 5.0
"""The widest noise tried has the root mean square of what it is added to; the narrowest is narrower by this at most."""
COORDINATES = 2**18
"""Of a larger gradient so many entries, drawn once, are compared: the error of a cosine is 1 / sqrt of that."""
DIRECTIONS = 8
"""Independent directions of an estimate, at least; strategies with fewer (MeZO has one) make several estimates."""
AGREED = 0.95
"""Least cosine of neighbours that tells of a range without rounding and curvature."""


@dataclass(frozen=True)
class SigmaSearch:
    """What was found at one site.

    Attributes:
        given: Width before the search.
        found: Width that was chosen.
        least: The least width that the precision resolves there.
        sigmas: Widths that were tried, ascending.
        halves: At each of them the cosine between estimates from independent halves of the queries.
        agreement: The cosine with the estimates from the same noise at the neighbouring widths, the lower of both.
        given_halves: ``halves`` at the width before the search.
        given_agreement: The cosine of the estimates there with those at the width that was chosen.
    """

    given: float
    found: float
    least: float
    sigmas: tuple[float, ...]
    halves: tuple[float, ...]
    agreement: tuple[float, ...]
    given_halves: float
    given_agreement: float

    @property
    def found_halves(self) -> float:
        """``halves`` at the width that was chosen."""
        return self.halves[self.sigmas.index(self.found)]


@torch.no_grad()
def find_sigmas(
    strategy: ForwardGradientStrategy, batches: Sequence[tuple[Any, Any]], *, widths: int = 12
) -> dict[str, SigmaSearch]:
    """Find the width of the noise at each site of a bound strategy.

    Neither the strategy nor ``.grad`` changes; ``strategy.set_sigmas`` takes what was found. A search costs two
    estimates of each batch with each width and with that before the search.

    Args:
        strategy: A strategy that is bound to its network.
        batches: Inputs and targets, as ``clean_pass`` takes them; four or so.
        widths: Widths tried at each site.

    Returns:
        By the site's name; empty for a strategy without a width.

    Raises:
        SettingError: Fewer than 3 ``widths``, or no batch.

    Example:
        >>> from flops_lightning import LikelihoodRatio, SiteSpec, stage_network
        >>> _ = torch.manual_seed(0)
        >>> network = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        >>> strategy = LikelihoodRatio(sites=[SiteSpec(["0", "1"], sigma=3.0), SiteSpec(["2"])], seed=0)
        >>> strategy.bind(stage_network(network), lambda output, target: (output - target).square().sum(1))
        >>> found = find_sigmas(strategy, [(torch.randn(16, 2), torch.ones(16, 1))])
        >>> strategy.set_sigmas({name: site.found for name, site in found.items()})
        >>> found["0..1"].given, found["0..1"].found < 0.1
        (3.0, True)
    """
    check_at_least("widths", widths, 3)
    check_at_least("batches", len(batches), 1, "Give four, for example.")
    if not strategy.sigmas:
        return {}
    given, probe = strategy.sigmas, copy(strategy)
    probe.meter = QueryMeter()
    searches: dict[str, _Gram] = {}
    with warnings.catch_warnings(), _keeping_gradients(strategy):
        warnings.simplefilter("ignore", RuntimeWarning)  # of widths that are too small and queries that are lost
        for number, batch in enumerate(batches):
            probe.set_sigmas(given)
            clean = probe.clean_pass(*batch)
            if not number:
                searches = {site.name: _Gram(site, probe.sites, clean, widths) for site in probe.sites}
            for column in range(widths + 1):
                probe.set_sigmas({name: search.column[column] for name, search in searches.items()})
                halves = [_mean_estimate(probe, clean, searches, half) for half in (0, 1)]
                for name, search in searches.items():
                    search.add(column, halves[0][name], halves[1][name])
            for search in searches.values():
                search.complete()
    return {name: search.result() for name, search in searches.items()}


class _Gram:
    """Inner products of a site's estimates of all widths, with those that were given as the last."""

    def __init__(self, site: Site, sites: Sequence[Site], clean: CleanPass, widths: int) -> None:
        values, self.given = perturbed_values(site, clean), site.sigma
        size = _root_mean_square(values) or 1.0  # of a layer that starts at zero
        least = least_sigma(site, sites, clean)[1]
        self.least = least if math.isfinite(least) else 0.0
        low = min(max(self.least, size * 10**-DECADES), size / 10)
        steps = (low * (size / low) ** (i / (widths - 1)) for i in range(widths))
        self.column = (*(float(f"{rounded_up(step):.2g}") for step in steps), self.given)
        entries = sum(p.numel() for p in site.parameters.values())
        draw = torch.Generator().manual_seed(0)
        self._entries = torch.randint(entries, (COORDINATES,), generator=draw) if entries > COORDINATES else None
        self._rows: list[Tensor] = []
        self._products: list[Tensor] = []  # (half, width, half, width) of each batch

    def gradient(self, site: Site) -> Tensor:
        """The site's ``.grad``, as one vector."""
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in site.parameters.values()]
        whole = torch.cat([part.flatten() for part in parts])
        return whole if self._entries is None else whole[self._entries.to(whole.device)]

    def add(self, column: int, first: Tensor, second: Tensor) -> None:
        """Take the estimates of both halves at a width."""
        assert len(self._rows) == column
        self._rows.append(torch.stack((first, second)).cpu().double())

    def complete(self) -> None:
        """A batch is done."""
        rows = torch.stack(self._rows, dim=1)
        self._products.append(torch.einsum("akn,bln->akbl", rows, rows))
        self._rows = []

    def result(self) -> SigmaSearch:
        """Choose."""
        total, width = torch.stack(self._products).sum(0), len(self.column) - 1
        halves, same = _cosines(total)
        agreement = torch.stack([torch.minimum(same[i, max(i - 1, 0)], same[i, min(i + 1, width - 1)])
                                 for i in range(width)])  # fmt: skip
        single = torch.stack([_cosines(each[None].sum(0))[0] for each in self._products])[:, :width]
        place = chosen(halves[:width], agreement, _standard_error(single))
        return SigmaSearch(
            self.given, self.column[place], self.least, self.column[:width], tuple(halves[:width].tolist()),
            tuple(agreement.tolist()), float(halves[width]), float(same[place, width]),
        )  # fmt: skip


def _root_mean_square(values: Sequence[Tensor]) -> float:
    """0 of integers, which an embedding below the noise reads."""
    known = [v[v.isfinite()].float() for v in values if v.is_floating_point()]  # logits may be masked with -inf
    return math.hypot(*(float(v.norm()) for v in known)) / math.sqrt(max(1, sum(v.numel() for v in known)))


def chosen(halves: Tensor, agreement: Tensor, error: Tensor) -> int:
    """Place of the best of ``(k,)`` widths; ``error`` is the standard error of ``halves``.

    Of the inner widths that are no worse than the best by their halves, the one that agrees best with its neighbours;
    where none agrees, the widest that is no worse: narrow noise would change the loss of few samples.
    """
    top = int(halves.argmax())
    fits = halves >= halves[top] - 2 * torch.maximum(error, error[top])
    inner = fits.clone()
    inner[[0, -1]] = False  # they have one neighbour
    best = int(torch.where(inner, agreement, -1.0).argmax())
    return best if inner[best] and agreement[best] >= AGREED else int(fits.nonzero()[-1])


def _cosines(products: Tensor) -> tuple[Tensor, Tensor]:
    """``(k,)`` cosines between the halves, ``(k, k)`` between widths in the same half; 0 for an estimate of zero."""
    square = torch.einsum("akak->ak", products)
    across = torch.einsum("kk->k", products[0, :, 1, :]) / square.prod(0).sqrt()
    lengths = square.sum(0).sqrt()
    within = torch.einsum("akal->kl", products) / torch.outer(lengths, lengths)
    return across.nan_to_num(0.0), within.nan_to_num(0.0)


def _standard_error(values: Tensor) -> Tensor:
    """Of the mean over the first axis; of a single value, as large as can be."""
    if len(values) < 2:
        return torch.full_like(values[0], math.inf)
    return values.std(0) / math.sqrt(len(values))


def _mean_estimate(
    probe: ForwardGradientStrategy, clean: CleanPass, searches: Mapping[str, _Gram], half: int
) -> dict[str, Tensor]:
    """The mean estimate of a half of the queries, by site; the same noise for each width."""
    directions = int(min(site.queries_per_sample for site in probe.sites)) // 2
    draws = max(1, -(-DIRECTIONS // max(1, directions)))
    _forget_gradients(probe)
    for draw in range(draws):
        probe.estimate(replace(clean, draw=(clean.draw * 2 + half) * draws + draw))
    return {site.name: searches[site.name].gradient(site) for site in probe.sites}


def _forget_gradients(strategy: ForwardGradientStrategy) -> None:
    for parameter in strategy.network.module.parameters():
        parameter.grad = None


@contextmanager
def _keeping_gradients(strategy: ForwardGradientStrategy) -> Iterator[None]:
    before = [(parameter, parameter.grad) for parameter in strategy.network.module.parameters()]
    try:
        yield
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient
