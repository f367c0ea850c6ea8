"""Train networks with forward passes only, and spend the queries where they reduce the variance most.

Names are loaded when first used, so that ``import flops_lightning`` costs nothing: neither the command line nor timm
nor scikit-learn is needed before something that uses it is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flops_lightning.allocators import (
        BernoulliAllocator,
        CostAwareAllocator,
        EqualAllocator,
        GaussianAllocator,
        OptimalAllocator,
        QueryAllocator,
    )
    from flops_lightning.callbacks import QueryAllocatorCallback
    from flops_lightning.datamodules import CIFAR10DataModule, DigitsDataModule
    from flops_lightning.network import Stage, StagedNetwork, stage_network
    from flops_lightning.strategies import (
        SPSA,
        Backprop,
        CoordinateFiniteDifferences,
        EvolutionStrategies,
        ForwardGradientStrategy,
        ForwardMode,
        LikelihoodRatio,
        MeZO,
        SiteSpec,
        WeightForwardMode,
    )
    from flops_lightning.tasks import ForwardImageClassifier

__version__ = "0.1.0.dev0"

_HOMES = {
    "Backprop": "strategies",
    "BernoulliAllocator": "allocators",
    "CIFAR10DataModule": "datamodules",
    "CoordinateFiniteDifferences": "strategies",
    "CostAwareAllocator": "allocators",
    "DigitsDataModule": "datamodules",
    "EqualAllocator": "allocators",
    "EvolutionStrategies": "strategies",
    "ForwardGradientStrategy": "strategies",
    "ForwardImageClassifier": "tasks",
    "ForwardMode": "strategies",
    "GaussianAllocator": "allocators",
    "LikelihoodRatio": "strategies",
    "MeZO": "strategies",
    "OptimalAllocator": "allocators",
    "QueryAllocator": "allocators",
    "QueryAllocatorCallback": "callbacks",
    "SPSA": "strategies",
    "SiteSpec": "strategies",
    "Stage": "network",
    "StagedNetwork": "network",
    "WeightForwardMode": "strategies",
    "stage_network": "network",
}

__all__ = [
    "SPSA",
    "Backprop",
    "BernoulliAllocator",
    "CIFAR10DataModule",
    "CoordinateFiniteDifferences",
    "CostAwareAllocator",
    "DigitsDataModule",
    "EqualAllocator",
    "EvolutionStrategies",
    "ForwardGradientStrategy",
    "ForwardImageClassifier",
    "ForwardMode",
    "GaussianAllocator",
    "LikelihoodRatio",
    "MeZO",
    "OptimalAllocator",
    "QueryAllocator",
    "QueryAllocatorCallback",
    "SiteSpec",
    "Stage",
    "StagedNetwork",
    "WeightForwardMode",
    "__version__",
    "stage_network",
]


def __getattr__(name: str) -> object:
    """Import the public name from its home on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted({*globals(), *__all__})
