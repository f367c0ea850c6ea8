"""The noise std of each site, learned by the likelihood-ratio derivative of the smoothed loss in log sigma.

For ``e = sigma z``, ``z ~ N(0, I)`` in ``d`` dimensions, the score in log sigma is ``||z||^2 - d``, hence
``d/dlog(sigma) E L_b(h + e) = E (L_b(h + sigma z) - c) (||z||^2 - d)`` for any ``c`` that does not depend on ``z``:
here the clean loss. It comes from the queries that estimate the gradient anyway.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flops_lightning.errors import SettingError
from flops_lightning.strategies.sites import Site

RANGE = 10.0
"""Sigma stays within this factor of the one that was set."""


class LearnedSigma:
    """One log sigma a site, stepped by Adam."""

    def __init__(self, rate: float) -> None:
        """Choose the learning rate of log sigma.

        Raises:
            SettingError: it is not positive.
        """
        if not 0 < rate < math.inf:
            raise SettingError(
                "strategy.learn_sigma", rate, "is no learning rate.", "Write 0 for a fixed sigma, or for example 0.02."
            )
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
            name: {"log_sigma": float(parameter), "optimizer": optimizer.state_dict()}
            for name, (parameter, optimizer) in self._sites.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; the learning rate stays the one that was set."""
        self._sites = {}
        for name, values in state.items():
            optimizer = self._add(name, values["log_sigma"])
            optimizer.load_state_dict(values["optimizer"])
            optimizer.param_groups[0]["lr"] = self.rate
