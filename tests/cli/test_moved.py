from importlib import import_module
from importlib.util import find_spec

import pytest

from flops_lightning.cli.messages import MOVED, new_name

IN_CONFIGURATIONS = """
allocators: BernoulliAllocator CostAwareAllocator EqualAllocator GaussianAllocator OptimalAllocator
callbacks: ClassReport PredictionWriter QueryAllocatorCallback RunSummary SaveOnSignal
datamodules: Caltech101DataModule CIFAR100DataModule CIFAR10DataModule DigitsDataModule EuroSATDataModule
datamodules: Flowers102DataModule Food101DataModule ImageDataModule ImageNetDataModule
objectives: zero_one_error
strategies: Backprop CoordinateFiniteDifferences EvolutionStrategies ForwardMode LikelihoodRatio MeZO NoiseSpec
strategies: PilotSpec SPSA SiteSpec WeightForwardMode
tasks: ForwardImageClassifier
"""
"""Paths that users have in their YAML files, those of all configurations so far among them."""


@pytest.mark.parametrize("line", IN_CONFIGURATIONS.strip().splitlines())
def test_the_paths_that_configurations_use_stay(line):
    package, names = line.split(": ")
    module = import_module(f"flops_lightning.{package}")
    assert [getattr(module, name).__name__ for name in names.split()] == names.split()


@pytest.mark.parametrize("new", sorted(set(MOVED.values())))
def test_there_is_a_module_where_the_table_says(new):
    assert find_spec(new) is not None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tasks.optimisation.OptimizerSettings", "tasks.OptimizerSettings"),
        ("tasks.optimisation.build_optimizer", "optim.optimizers.build_optimizer"),
        ("callbacks.save_on_signal.SaveOnSignal", "callbacks.SaveOnSignal"),
        ("checkpoint_io.AtomicCheckpointIO", "resume.checkpoint_files.AtomicCheckpointIO"),
        ("noise_kinds.NoiseSpec", "strategies.NoiseSpec"),
        ("planning.trainer.PlanningTrainer", "plan.trainer.PlanningTrainer"),
        ("staging.stage_network", "network.stage_network"),
        ("strategies.no_longer_there.SPSA", "strategies.SPSA"),
        ("datamodules.no_longer_there.DigitsDataModule", "datamodules.DigitsDataModule"),
    ],
)
def test_a_name_that_has_moved_is_found(old, new):
    assert new_name(f"flops_lightning.{old}") == f"flops_lightning.{new}"
    package, _, name = new.rpartition(".")
    assert getattr(import_module(f"flops_lightning.{package}"), name).__name__ == name


@pytest.mark.parametrize(
    "path", ["torch.staging.Stage", "flops_lightning.nowhere.Nothing", "flops_lightning.tasks.Nothing"]
)
def test_a_name_that_was_never_there_has_no_new_one(path):
    assert new_name(path) == ""
