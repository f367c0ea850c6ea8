"""Backprop under the noise that queries inject: a control for what learning under noise explains."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from flops_lightning.errors import SettingError, check_positive
from flops_lightning.network.staging import StagedNetwork


class ActivationNoise(Callback):
    """Add Gaussian noise to the outputs of stages in every pass of training, and in no other.

    The likelihood ratio's queries add it at one site at a time; here one pass carries the noise of all of them.

    Args:
        sigma: Standard deviation by the name of the stage, as ``{"blocks.4": 0.03, "head": 0.03}``.
    """

    def __init__(self, sigma: dict[str, float]) -> None:
        for name, width in sigma.items():
            check_positive(f"sigma.{name}", width, "Write the width of the site there.")
        self.sigma = sigma

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the noise behind the stages: the strategy runs these, and tests run the module itself."""
        network = pl_module.network
        assert isinstance(network, StagedNetwork)
        for name in self.sigma:
            if name not in network.index:
                problem = f"the network has no such stage, but {', '.join(network.index)}."
                raise SettingError("sigma", name, problem, "Name the last stage of a site.")
        network.stages = tuple(
            replace(stage, run=partial(_noisy, stage.run, self.sigma[stage.name]))
            if stage.name in self.sigma
            else stage
            for stage in network.stages
        )


def _noisy(run: Callable[[Tensor], Tensor], sigma: float, x: Tensor) -> Tensor:
    output = run(x)
    return output + sigma * torch.randn_like(output)
