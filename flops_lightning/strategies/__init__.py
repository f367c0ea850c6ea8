"""Gradient strategies: one interface, one file for each estimator."""

from __future__ import annotations

from flops_lightning.noise.kinds import NoiseSpec
from flops_lightning.strategies.backprop import Backprop
from flops_lightning.strategies.base import Estimate, ForwardGradientStrategy
from flops_lightning.strategies.coordinate_finite_differences import CoordinateFiniteDifferences
from flops_lightning.strategies.evolution_strategies import EvolutionStrategies
from flops_lightning.strategies.forward_mode import ForwardMode, WeightForwardMode
from flops_lightning.strategies.likelihood_ratio import LikelihoodRatio
from flops_lightning.strategies.mezo import MeZO
from flops_lightning.strategies.pilots import PilotSpec
from flops_lightning.strategies.site_specs import SiteSpec
from flops_lightning.strategies.sites import Site
from flops_lightning.strategies.spsa import SPSA

__all__ = [
    "SPSA",
    "Backprop",
    "CoordinateFiniteDifferences",
    "Estimate",
    "EvolutionStrategies",
    "ForwardGradientStrategy",
    "ForwardMode",
    "LikelihoodRatio",
    "MeZO",
    "NoiseSpec",
    "PilotSpec",
    "Site",
    "SiteSpec",
    "WeightForwardMode",
]
