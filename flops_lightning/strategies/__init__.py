"""Gradient strategies: one interface, one file for each estimator."""

from flops_lightning.noise.kinds import NoiseSpec
from flops_lightning.strategies.backprop import Backprop
from flops_lightning.strategies.base import Estimate, ForwardGradientStrategy
from flops_lightning.strategies.candidate_search import CandidateSearch
from flops_lightning.strategies.coordinates import CoordinateFiniteDifferences
from flops_lightning.strategies.forward_mode import ForwardMode, WeightForwardMode
from flops_lightning.strategies.likelihood_ratio import LikelihoodRatio
from flops_lightning.strategies.mezo import MeZO
from flops_lightning.strategies.parameter_perturbation import SPSA, EvolutionStrategies
from flops_lightning.strategies.pilots import PilotSpec
from flops_lightning.strategies.site_specs import SiteSpec
from flops_lightning.strategies.sites import Site

__all__ = [
    "SPSA", "Backprop", "CandidateSearch", "CoordinateFiniteDifferences", "Estimate", "EvolutionStrategies",
    "ForwardGradientStrategy", "ForwardMode", "LikelihoodRatio", "MeZO", "NoiseSpec", "PilotSpec", "Site", "SiteSpec",
    "WeightForwardMode",
]  # fmt: skip
