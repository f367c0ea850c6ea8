"""``Backprop``: the exact gradient, the upper bound of every forward-only estimate, behind the same interface."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from flops_lightning.allocators.statistics import SampleStatistics
from flops_lightning.errors import SettingError
from flops_lightning.meter import CLEAN
from flops_lightning.queries import CleanPass, LossFunction, at_least_float32, row_losses
from flops_lightning.staging import StagedNetwork
from flops_lightning.strategies.base import (
    Estimate,
    ForwardGradientStrategy,
    add_gradients,
    refuse_second_network,
)
from flops_lightning.strategies.sites import Site


class Backprop(ForwardGradientStrategy):
    """Reverse-mode gradient of the mean loss, in eval mode like the queries (no dropout), so that objectives agree."""

    def bind(self, network: StagedNetwork, loss: LossFunction) -> None:
        """Keep network and loss.

        Raises:
            SettingError: the network has no trainable parameter.
        """
        if not network.trainable():
            raise SettingError("freeze", list(network.frozen()), "leaves nothing to train.", "Freeze less.")
        refuse_second_network(getattr(self, "network", None), network)
        self.network, self.loss = network, loss

    @property
    def sites(self) -> tuple[Site, ...]:
        """None: backprop spends no queries."""
        return ()

    @property
    def budget(self) -> None:
        """None: there is nothing to allocate."""
        return

    @property
    def update_groups(self) -> tuple[tuple[str, ...], ...]:
        """One step with all parameters."""
        return ((),)

    def clean_pass(self, inputs: Tensor, targets: Tensor) -> CleanPass:
        """Run the batch and keep its graph for :meth:`estimate`.

        Raises:
            SettingError: the loss has no derivative.
        """
        with self.network.evaluating(), torch.enable_grad():
            embedding = self.network.run(inputs, 0, len(self.network) - 1)
            output = at_least_float32(self.network.run(embedding, len(self.network) - 1))
            loss = row_losses(self.loss, output, targets)
        if not loss.requires_grad:
            raise SettingError(
                "loss", getattr(self.loss, "__name__", type(self.loss).__name__), "has no derivative.",
                "Use a strategy that needs none, such as LikelihoodRatio, or a loss such as cross-entropy.",
            )  # fmt: skip
        self.draw += 1
        self.meter.add(CLEAN, clean_passes=len(loss), forward_equivalents=len(loss))
        return CleanPass(targets, {0: inputs}, output, loss, embedding.detach().flatten(1), self.draw - 1)

    def refresh(self, clean: CleanPass, updated: Sequence[str]) -> CleanPass:
        """Not needed: there is a single step."""
        raise RuntimeError(
            f"draw {clean.draw}: backprop has one update group, nothing to refresh after {list(updated)}."
        )

    def pilot_traces(self, clean: CleanPass) -> None:
        """None: backprop spends no queries."""

    def sample_statistics(
        self, clean: CleanPass, names: Collection[str] = (), metric: Mapping[str, Tensor] | None = None
    ) -> SampleStatistics:
        """Not to be had: there are no queries to allocate.

        Raises:
            SettingError: always.
        """
        raise SettingError(
            "trainer.callbacks", "QueryAllocatorCallback", f"{type(self).__name__} spends no queries "
            f"(batch of {clean.batch_size}, wanted: {sorted(names)}, metric: {metric is not None}).",
            "Remove the callback, or use a strategy with queries such as LikelihoodRatio.",
        )  # fmt: skip

    def estimate(
        self,
        clean: CleanPass,
        counts: Tensor | None = None,
        sites: Sequence[str] | None = None,
        *,
        pilot_weight: Tensor | None = None,
        traces: bool = False,
    ) -> Estimate:
        """Add the exact gradient to ``.grad``.

        Raises:
            SettingError: counts or pilot weights were given, or traces asked for.
        """
        if counts is not None or pilot_weight is not None or traces:
            given = None if counts is None else tuple(counts.shape)
            raise SettingError("counts", given, "backprop spends no queries.", "Remove the allocator.")
        if sites:
            raise SettingError("sites", list(sites), "backprop has no sites.", "Leave `sites` out.")
        parameters = self.network.trainable()
        finite = torch.isfinite(clean.loss.detach())
        detached = replace(clean, loss=clean.loss.detach(), output=clean.output.detach())
        self.meter.add(CLEAN, forward_equivalents=2 * clean.batch_size)  # a backward pass costs two forward passes
        if not bool(finite.any()):
            return Estimate(detached.loss, detached.output, 0, lost=0, silent_samples=len(finite), lost_batch=True)
        total = clean.loss.sum() / clean.batch_size
        if not bool(finite.all()):
            # A sample without a finite loss contributes nothing, as it would with queries; in its graph zero times NaN
            # would be NaN, so the others run again without it.
            with self.network.evaluating(), torch.enable_grad():
                output = self.network.run(clean.activations[0][finite])
                total = row_losses(self.loss, output, clean.targets[finite]).sum() / clean.batch_size
        gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        zeros = {name: torch.zeros_like(p) for name, p in parameters.items()}
        add_gradients(parameters, {n: zeros[n] if g is None else g for n, g in zip(parameters, gradients, strict=True)})
        return Estimate(detached.loss, detached.output, 0, silent_samples=int((~finite).sum()))
