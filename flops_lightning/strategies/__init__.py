"""Gradient strategies: one interface, one file for each estimator."""

from __future__ import annotations

from flops_lightning.strategies.backprop import Backprop
from flops_lightning.strategies.base import Estimate, ForwardGradientStrategy
from flops_lightning.strategies.likelihood_ratio import LikelihoodRatio
from flops_lightning.strategies.pilots import PilotSpec
from flops_lightning.strategies.site_specs import SiteSpec
from flops_lightning.strategies.sites import Site

__all__ = ["Backprop", "Estimate", "ForwardGradientStrategy", "LikelihoodRatio", "PilotSpec", "Site", "SiteSpec"]
