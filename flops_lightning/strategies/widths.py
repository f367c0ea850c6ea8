"""Width of the noise at each site: as set, by token, or learned from the queries of earlier steps.

:class:`TokenSigma` learns how tokens should differ. With relative widths ``r_t`` one query estimates
``delta_t = w z_t / r_t``. If the loss is linear over the noise, ``w = sum_s r_s g_s . z_s`` for the derivative ``g``,
so the trace of its covariance is about ``d (sum_s r_s^2 ||g_s||^2) (sum_t 1 / r_t^2)`` for ``d`` features. By the
Cauchy-Schwarz inequality that is least for ``r_t ~ ||g_t||^(-1/2)``, and smaller than with equal widths by
``T sum_t rho_t / (sum_t sqrt(rho_t))^2`` with ``rho_t = ||g_t||^2``.

:class:`LearnedSigma` learns the overall sigma from the smoothed loss. For ``e = sigma z``, ``z ~ N(0, I)`` in ``d``
dimensions, the score in log sigma is ``||z||^2 - d``, hence ``d/dlog(sigma) E L_b(h + e) =
E (L_b(h + sigma z) - c) (||z||^2 - d)`` for any ``c`` that does not depend on ``z``, here the clean loss. Both use the
queries that estimate the gradient anyway.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flops_lightning.errors import SettingError, check_positive
from flops_lightning.strategies.sites import Site

HALF_LIFE = 20
"""Steps after which an observation of ``rho`` has half its weight.

With B samples, n queries and T equal tokens of d features one step estimates ``rho`` with the relative error
``T sqrt(2 d / B) / n``: 1.2 for 17 tokens of 64 features, 64 samples and 20 queries. A half-life of 20 steps averages
as many as 58 equal ones: 0.16, and 0.04 in ``r ~ rho^(-1/4)``; in a run of a few hundred steps widths still follow.
"""

LIMIT = 8.0
"""Token widths stay within this factor of that of a token with the mean ``rho``."""
RANGE = 10.0
"""A learned sigma stays within this factor of its setting."""


@dataclass(frozen=True, eq=False)
class SiteWidth:
    """Width of the noise at a site.

    Attributes:
        sigma: Standard deviation; a tensor where it carries a tangent.
        relative: ``(t,)`` relative widths ``r_t`` of the tokens, mean square 1: the activation moves by ``sigma r_t
            z_t``. None: all are 1.
    """

    sigma: float | Tensor
    relative: Tensor | None = None

    def scaled(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """``r z``, by which (times sigma) the activation moves, and ``z / r``, which carries the gradient.

        With ``w = (L - c) / sigma``, ``E w z_t / r_t`` is the derivative with respect to the activation at token t.

        Args:
            z: ``(r, t, d)`` noise, or ``(r, c, ...)`` at a feature map, whose positions are the tokens.
        """
        if self.relative is None:
            return z, z
        r = _beside(self.relative, z)
        return z * r, z / r

    def unscaled(self, direction: Tensor) -> Tensor:
        """The noise ``z`` itself, from ``z / r``."""
        return direction if self.relative is None else direction * _beside(self.relative, direction)


def _beside(relative: Tensor, z: Tensor) -> Tensor:
    return relative.to(z)[:, None] if z.dim() == 3 else relative.to(z).view(z.shape[2:])


def by_token(x: Tensor) -> Tensor:
    """``(r, t, d)``: the tokens of ``(r, t, d)``, the positions of a feature map ``(r, c, ...)``, else one token."""
    if x.dim() == 3:
        return x
    return x.flatten(2).mT if x.dim() > 3 else x.reshape(len(x), 1, -1)


@dataclass(frozen=True, eq=False)
class RunningMean:
    """Exponential moving average of the tokens' ``rho`` at one site.

    Attributes:
        mean: ``(t,)`` sum of ``rho`` with decaying weights ``k_i``.
        error: ``(t,)`` its squared standard error: the sum of those of single steps with weights ``k_i^2``.
        mass: The sum of the weights, 1 in the long run.
    """

    mean: Tensor
    error: Tensor
    mass: Tensor

    @classmethod
    def empty(cls, like: Tensor) -> "RunningMean":
        """The average before the first step, for tokens ``(t,)``."""
        return cls(torch.zeros_like(like), torch.zeros_like(like), like.new_zeros(()))

    def updated(self, squares: Tensor) -> "RunningMean":
        """The average after one more step.

        Args:
            squares: ``(b, t)`` unbiased estimates of each sample's ``rho``, NaN where there is none. The standard error
                of their mean comes from how the samples differ; a batch with fewer than two is skipped.
        """
        known = torch.isfinite(squares).all(1, keepdim=True)
        n = known.sum()
        mean = torch.where(known, squares, 0.0).sum(0) / n.clamp(min=1)
        scatter = torch.where(known, squares - mean, 0.0).square().sum(0)
        error = scatter / (n * (n - 1)).clamp(min=1)
        keep = 0.5 ** (1 / HALF_LIFE)
        share, enough = 1 - keep, n > 1
        return RunningMean(
            torch.where(enough, keep * self.mean + share * mean, self.mean),
            torch.where(enough, keep**2 * self.error + share**2 * error, self.error),
            torch.where(enough, keep * self.mass + share, self.mass),
        )

    def widths(self) -> Tensor:
        """``(t,)`` relative widths ``r ~ rho^(-1/4)``, mean square 1; all 1 before the first step.

        A ``rho`` below its own standard error (without influence it may even be negative) counts as large as that
        error: too much noise at a token that matters costs more than too little at one that does not.
        """
        rho = torch.maximum(self.mean, self.error.sqrt()) / self.mass
        raw = (rho / rho.mean()).pow(-0.25).clamp(1 / LIMIT, LIMIT)
        return torch.where(rho.sum() > 0, raw / raw.square().mean().sqrt(), 1.0)


class TokenSigma:
    """Relative widths of the tokens of all sites."""

    def __init__(self) -> None:
        self._sites: dict[str, RunningMean] = {}

    def observe(self, site: str, squares: Tensor) -> None:
        """Take ``(b, t)`` estimates of ``rho`` at a site (:meth:`DeltaSums.token_mean_squares`)."""
        running = self._sites.get(site) or RunningMean.empty(squares[0])
        if running.mean.shape != squares[0].shape:
            raise SettingError(
                "model.strategy.token_sigma", True, f"site {site!r} has {squares.shape[1]} tokens, and had "
                f"{len(running.mean)} before.", "Write false, or bring all inputs to one size.",
            )  # fmt: skip
        moved = RunningMean(**{name: value.to(squares) for name, value in vars(running).items()})
        self._sites[site] = moved.updated(squares)

    def widths(self, site: str) -> Tensor | None:
        """``(t,)`` relative widths at a site; None before its first observation."""
        running = self._sites.get(site)
        return None if running is None else running.widths()

    def state_dict(self) -> dict[str, Any]:
        """The running averages."""
        return {site: asdict(running) for site, running in self._sites.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._sites = {site: RunningMean(**values) for site, values in state.items()}


class LearnedSigma:
    """One log sigma for each site, stepped by Adam."""

    def __init__(self, rate: float) -> None:
        check_positive("model.strategy.learn_sigma", rate, "Write 0 for a fixed sigma, or for example 0.02.")
        self.rate = rate
        self._sites: dict[str, tuple[nn.Parameter, torch.optim.Adam]] = {}

    def sigma(self, site: Site) -> float:
        """Present sigma of a site."""
        return float(self._of(site)[0].detach().exp())

    def step(self, site: Site, slope: Tensor) -> None:
        """One step of Adam against ``slope``, the derivative of the smoothed loss in log sigma."""
        log_sigma, optimizer = self._of(site)
        log_sigma.grad = slope.detach().to(log_sigma)
        optimizer.step()
        own = math.log(site.sigma)
        log_sigma.data.clamp_(own - math.log(RANGE), own + math.log(RANGE))

    def _of(self, site: Site) -> tuple[nn.Parameter, torch.optim.Adam]:
        if site.name not in self._sites:
            self._add(site.name, math.log(site.sigma))
        return self._sites[site.name]

    def _add(self, name: str, log_sigma: float) -> torch.optim.Adam:
        parameter = nn.Parameter(torch.tensor(log_sigma, dtype=torch.float64))
        optimizer = torch.optim.Adam([parameter], lr=self.rate)
        self._sites[name] = (parameter, optimizer)
        return optimizer

    def state_dict(self) -> dict[str, Any]:
        """Log sigmas and the state of their optimisers."""
        return {
            name: {"log_sigma": float(parameter.detach()), "optimizer": optimizer.state_dict()}
            for name, (parameter, optimizer) in self._sites.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; the learning rate stays as set."""
        self._sites = {}
        for name, values in state.items():
            optimizer = self._add(name, values["log_sigma"])
            optimizer.load_state_dict(values["optimizer"])
            optimizer.param_groups[0]["lr"] = self.rate
