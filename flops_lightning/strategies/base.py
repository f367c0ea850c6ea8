"""The interface of everything that can fill ``.grad``: forward-only estimators and backprop alike."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flops_lightning.distributed import Communicator, SingleProcess
from flops_lightning.errors import SettingError
from flops_lightning.meter import QueryMeter
from flops_lightning.network.staging import StagedNetwork
from flops_lightning.protocol import QueryBudget, SampleStatistics, TraceObservation
from flops_lightning.queries import CleanPass, LossFunction
from flops_lightning.settings import KeepsSettings
from flops_lightning.strategies.setting_checks import check_common_seed
from flops_lightning.strategies.sites import Site

Exchange = Literal["gradients", "losses"]
"""What ranks tell each other: their gradients, or the scalars that weigh directions which every rank can draw."""


@dataclass(frozen=True, eq=False)
class Estimate:
    """What one call of ``estimate`` did; the gradient itself is in ``.grad``.

    Attributes:
        loss: ``(b,)`` clean losses.
        output: ``(b, ...)`` clean output of the network.
        queries: Queries spent, pilots left out.
        lost: Queries lost to non-finite losses, their antithetic partners included.
        silent_samples: (sample, site) pairs that contributed nothing because all their queries were lost.
        lost_batch: No query survived at any site: ``.grad`` was not touched and the step should be skipped.
        observation: Traces seen in these queries, where they were asked for; NaN at sites that were not estimated and
            where several layers were perturbed together.
    """

    loss: Tensor
    output: Tensor
    queries: int
    lost: int = 0
    silent_samples: int = 0
    lost_batch: bool = False
    observation: TraceObservation | None = None


class ForwardGradientStrategy(KeepsSettings, ABC):
    """Estimates the gradient of ``(1/b) sum_b L_b`` in a network's trainable parameters.

    Use: ``bind`` once; for each batch ``clean_pass``, then ``estimate`` for each entry of ``update_groups``, with
    ``refresh`` in between if there are several.

    Attributes:
        communicator: The ranks that train together; see :meth:`join`.
        rank: Rank of the process; part of every noise key, so that ranks draw different directions.
        exchange: ``gradients``: ``.grad`` is that of this rank's samples, to be reduced over the ranks
            (:func:`flops_lightning.distributed.reduce_gradients`). ``losses``: it is that of all ranks already.
        draw: Draw counter: number of batches seen, skipped ones included.
        meter: What has been paid so far.
    """

    network: StagedNetwork
    communicator: Communicator = SingleProcess()
    rank: int = 0
    exchange: Exchange = "gradients"
    draw: int = 0

    def __init__(self) -> None:
        """Start with nothing paid."""
        self.meter = QueryMeter()

    @abstractmethod
    def bind(self, network: StagedNetwork, loss: LossFunction) -> None:
        """Resolve the settings against a network; the loss returns one value a row.

        Raises:
            SettingError: a setting does not fit the network.
        """

    def join(self, communicator: Communicator) -> None:
        """Train together with other ranks: directions differ from rank to rank, what is learned of them is shared.

        Raises:
            SettingError: the ranks have different seeds.
        """
        self.communicator, self.rank = communicator, communicator.rank
        if hasattr(self, "seed"):
            device = next(self.network.module.parameters()).device
            check_common_seed(communicator, self.seed, device=device)

    def used_by_any(self, used: Sequence[bool]) -> list[bool]:
        """Which gradients count: those that any of the ranks has queries for, where ranks exchange losses.

        Every rank must ask, and is told the same: one without queries that count draws the directions of the others.
        """
        if self.exchange == "gradients" or self.communicator.size == 1:
            return list(used)
        device = next(iter(self.network.module.parameters())).device
        flags = torch.tensor([float(each) for each in used], device=device)
        return [bool(n) for n in self.communicator.sum(flags).tolist()]

    @property
    @abstractmethod
    def sites(self) -> tuple[Site, ...]:
        """Sites from bottom to top; empty for a strategy without queries."""

    @property
    def exact_sites(self) -> tuple[Site, ...]:
        """Sites above these whose gradient is exact and costs no query: they have no budget, counts or traces."""
        return ()

    @property
    @abstractmethod
    def budget(self) -> QueryBudget | None:
        """What an allocator may split, one entry per site, pilots taken off; None for a strategy without queries."""

    @property
    @abstractmethod
    def update_groups(self) -> tuple[tuple[str, ...], ...]:
        """Names of the sites, exact ones included, to be estimated before each optimiser step, in order."""

    @abstractmethod
    def clean_pass(self, inputs: Tensor, targets: Tensor) -> CleanPass:
        """Run the batch unperturbed and advance the draw counter."""

    @abstractmethod
    def refresh(self, clean: CleanPass, updated: Sequence[str]) -> CleanPass:
        """The clean pass after the parameters of the sites ``updated`` changed."""

    @abstractmethod
    def pilot_traces(self, clean: CleanPass) -> TraceObservation | None:
        """Spend the pilots on this batch and return what they tell of the traces; None where none are configured."""

    @abstractmethod
    def sample_statistics(
        self, clean: CleanPass, names: Collection[str] = (), metric: Mapping[str, Tensor] | None = None
    ) -> SampleStatistics:
        """Spend the pilots, if any, and tell an allocator what is known of the samples before their queries.

        Args:
            clean: The batch's clean pass.
            names: Fields of :class:`SampleStatistics` to fill beside those that cost nothing.
            metric: Weights of the squared derivatives, by parameter name, for ``preconditioned_scale``.
        """

    @abstractmethod
    def estimate(
        self,
        clean: CleanPass,
        counts: Tensor | None = None,
        sites: Sequence[str] | None = None,
        *,
        pilot_weight: Tensor | None = None,
        traces: bool = False,
    ) -> Estimate:
        """Add the gradient estimate to ``.grad`` of the sites' parameters.

        Args:
            clean: The batch's clean pass.
            counts: ``(s, b)`` or ``(b,)`` integer queries of each sample (at each site); None: the budget in equal
                parts.
            sites: Names of the sites to estimate; None: all.
            pilot_weight: ``(s, b)`` weights of reused pilots, chosen without a look at them; None: their share of the
                budget.
            traces: Also return the traces that these queries show.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to draw the same noise and go on counting."""
        return {"draw": self.draw, "meter": self.meter.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.draw = int(state["draw"])
        self.meter.load_state_dict(state["meter"])


def refuse_second_network(bound: StagedNetwork | None, network: StagedNetwork) -> None:
    """One strategy serves one network: its sites hold that network's parameters.

    Raises:
        SettingError: the strategy is bound to another network.
    """
    if bound is not None and bound.module is not network.module:
        raise SettingError(
            "strategy", type(bound.module).__name__, "already serves another network.", "Make one for each network."
        )


def add_gradients(parameters: Mapping[str, nn.Parameter], gradients: Mapping[str, Tensor]) -> None:
    """Add to ``.grad`` as ``backward`` would."""
    for name, gradient in gradients.items():
        parameter = parameters[name]
        typed = gradient.to(parameter.dtype)
        parameter.grad = typed if parameter.grad is None else parameter.grad + typed


def warn_silent(number: int, what: str, *, smaller: str = "sigma or learning rate") -> None:
    """Say what contributes nothing to a step; to be called by an ``estimate`` under ``torch.no_grad``."""
    warnings.warn(
        f"{number} {what} lost every query to non-finite losses and contribute nothing to this step. A smaller "
        f"{smaller}, or a higher precision, keeps losses finite.",
        RuntimeWarning, stacklevel=4,  # past this function, the estimate and its decorator
    )  # fmt: skip


def summed(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Sum of gradients by name, in the tensors of the first part that has them."""
    total: dict[str, Tensor] = {}
    for part in parts:
        for name, gradient in part.items():
            total[name] = total[name].add_(gradient) if name in total else gradient
    return total


def resolve_seed(seed: int | None) -> int:
    """The given seed, or the one that ``seed_everything`` (or torch itself) started from."""
    return torch.initial_seed() & 0x7FFFFFFF if seed is None else seed
