"""Strategies that treat a batch as a whole: no counts by sample, so nothing to allocate, no pilots and one step."""

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from flops_lightning.errors import SettingError
from flops_lightning.network.staging import StagedNetwork
from flops_lightning.protocol import SampleStatistics
from flops_lightning.queries import CleanPass, LossFunction
from flops_lightning.strategies.base import Estimate, ForwardGradientStrategy, refuse_second_network


class WholeBatchStrategy(ForwardGradientStrategy):
    """Answers the questions about samples and sites for strategies that have none.

    Attributes:
        why: Why there is nothing to allocate: what follows the strategy's name in a sentence.
        instead: What to use with an allocator.
    """

    why: ClassVar[str]
    instead: ClassVar[str] = "a strategy whose samples have queries of their own such as LikelihoodRatio"

    def bind(self, network: StagedNetwork, loss: LossFunction) -> None:
        """See :meth:`ForwardGradientStrategy.bind`."""
        if not network.trainable():
            raise SettingError("freeze", list(network.frozen()), "leaves nothing to train.", "Freeze less.")
        refuse_second_network(getattr(self, "network", None), network)
        self.network, self.loss = network, loss

    @property
    def budget(self) -> None:
        """None: there is nothing to allocate."""
        return

    @property
    def update_groups(self) -> tuple[tuple[str, ...], ...]:
        """One step with all parameters."""
        return (tuple(site.name for site in self.sites),)

    def refresh(self, clean: CleanPass, updated: Sequence[str]) -> CleanPass:
        """Not needed: there is a single step."""
        raise RuntimeError(f"draw {clean.draw}: there is one update group, nothing to refresh after {list(updated)}.")

    def pilot_traces(self, clean: CleanPass) -> None:
        """None: there is nothing to allocate."""

    def sample_statistics(
        self, clean: CleanPass, names: Collection[str] = (), metric: Mapping[str, Tensor] | None = None
    ) -> SampleStatistics:
        """Refused: there is nothing to allocate."""
        raise SettingError(
            "trainer.callbacks", "QueryAllocatorCallback", f"{type(self).__name__} {self.why} (batch of "
            f"{clean.batch_size}, wanted: {sorted(names)}, metric: {metric is not None}).",
            f"Remove the callback, or use {self.instead}.",
        )  # fmt: skip

    def estimate(
        self, clean: CleanPass, counts: Tensor | None = None, sites: Sequence[str] | None = None, *,
        pilot_weight: Tensor | None = None, inclusion: Tensor | None = None, traces: bool = False,
    ) -> Estimate:  # fmt: skip
        """Add the gradient to ``.grad``; counts, weights and traces are refused."""
        if counts is not None or pilot_weight is not None or inclusion is not None or traces:
            given = None if counts is None else tuple(counts.shape)
            raise SettingError("counts", given, f"{type(self).__name__} {self.why}.", "Remove the allocator.")
        names = [site.name for site in self.sites]
        if sites and list(sites) != names:
            own = f"has the site {names[0]!r} alone" if names else "has no sites"
            raise SettingError("sites", list(sites), f"{type(self).__name__} {own}.", "Leave `sites` out.")
        with torch.no_grad():
            return self._estimate(clean)

    @abstractmethod
    def _estimate(self, clean: CleanPass) -> Estimate:
        """Add the gradient to ``.grad``."""
