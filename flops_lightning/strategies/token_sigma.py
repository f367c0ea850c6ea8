"""How wide the noise should be at each token of a site, learned from the queries of earlier steps.

With relative widths ``r_t`` one query estimates ``delta_t = w z_t / r_t``. Where the loss is linear over the noise,
``w = sum_s r_s g_s . z_s`` for the derivative ``g``, so the trace of its covariance is about
``d (sum_s r_s^2 ||g_s||^2) (sum_t 1 / r_t^2)`` for ``d`` features. By the Cauchy-Schwarz inequality that is least for
``r_t ~ ||g_t||^(-1/2)``, and smaller than with equal widths by ``T sum_t rho_t / (sum_t sqrt(rho_t))^2`` with
``rho_t = ||g_t||^2``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from flops_lightning.errors import SettingError

HALF_LIFE = 20
"""Steps after which what was seen counts half.

With B samples, n queries and T equal tokens of d features one step tells ``rho`` with the relative error
``T sqrt(2 d / B) / n``: 1.2 for 17 tokens of 64 features, 64 samples and 20 queries. Averaging over a half-life of 20
steps, which weighs as 58 equal ones, makes that 0.16, and 0.04 in ``r ~ rho^(-1/4)``; in a run of a few hundred steps
widths still follow.
"""

LIMIT = 8.0
"""Widths are kept within this factor of that of a token with the mean ``rho``."""


@dataclass(frozen=True, eq=False)
class Running:
    """Exponential moving average of the tokens' ``rho`` at one site.

    Attributes:
        mean: ``(t,)`` sum of ``rho`` with weights ``k_i`` that fade.
        error: ``(t,)`` its squared standard error: the sum of those of single steps with weights ``k_i^2``.
        mass: The sum of the weights, 1 in the long run.
    """

    mean: Tensor
    error: Tensor
    mass: Tensor

    @classmethod
    def empty(cls, like: Tensor) -> Running:
        """Nothing seen of tokens ``(t,)``."""
        return cls(torch.zeros_like(like), torch.zeros_like(like), like.new_zeros(()))

    def seen(self, squares: Tensor) -> Running:
        """After one more step.

        Args:
            squares: ``(b, t)`` unbiased estimates of each sample's ``rho``, NaN where there is none. The standard error
                of their mean comes from how the samples differ; a batch with fewer than two is passed over.
        """
        known = torch.isfinite(squares).all(1, keepdim=True)
        n = known.sum()
        mean = torch.where(known, squares, 0.0).sum(0) / n.clamp(min=1)
        scatter = torch.where(known, squares - mean, 0.0).square().sum(0)
        error = scatter / (n * (n - 1)).clamp(min=1)
        keep = 0.5 ** (1 / HALF_LIFE)
        share, enough = 1 - keep, n > 1
        return Running(
            torch.where(enough, keep * self.mean + share * mean, self.mean),
            torch.where(enough, keep**2 * self.error + share**2 * error, self.error),
            torch.where(enough, keep * self.mass + share, self.mass),
        )

    def widths(self) -> Tensor:
        """``(t,)`` relative widths ``r ~ rho^(-1/4)``, mean square 1; all 1 where nothing is known.

        A ``rho`` below its own standard error (that of a token without influence may come out negative) is taken to be
        as large as that error: too much noise at a token that matters costs more than too little at one that does not.
        """
        rho = torch.maximum(self.mean, self.error.sqrt()) / self.mass
        raw = (rho / rho.mean()).pow(-0.25).clamp(1 / LIMIT, LIMIT)
        return torch.where(rho.sum() > 0, raw / raw.square().mean().sqrt(), 1.0)


class TokenSigma:
    """The running averages of all sites with tokens."""

    def __init__(self) -> None:
        """Nothing seen."""
        self._sites: dict[str, Running] = {}

    def observe(self, site: str, squares: Tensor) -> None:
        """Take ``(b, t)`` estimates of ``rho`` at a site (:meth:`DeltaSums.token_mean_squares`).

        Raises:
            SettingError: the site had another number of tokens before.
        """
        running = self._sites.get(site) or Running.empty(squares[0])
        if running.mean.shape != squares[0].shape:
            raise SettingError(
                "strategy.token_sigma", True, f"site {site!r} has {squares.shape[1]} tokens, and had "
                f"{len(running.mean)} before.", "Write false, or bring all inputs to one size.",
            )  # fmt: skip
        moved = Running(**{name: value.to(squares) for name, value in vars(running).items()})
        self._sites[site] = moved.seen(squares)

    def widths(self, site: str) -> Tensor | None:
        """``(t,)`` relative widths at a site; None before anything was seen there."""
        running = self._sites.get(site)
        return None if running is None else running.widths()

    def state_dict(self) -> dict[str, Any]:
        """The running averages."""
        return {site: asdict(running) for site, running in self._sites.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._sites = {site: Running(**values) for site, values in state.items()}
