"""The interface of everything that can fill ``.grad``: forward-only estimators and backprop alike."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from flops_lightning.distributed import Communicator, gather_plain
from flops_lightning.errors import SettingError
from flops_lightning.meter import QueryMeter
from flops_lightning.network.memory import ChunkRows, RowsSetting
from flops_lightning.network.staging import StagedNetwork
from flops_lightning.noise.generators import GeneratorChoice, GeneratorSetting
from flops_lightning.protocol import QueryBudget, SampleStatistics, TraceObservation
from flops_lightning.queries import CleanPass, LossFunction, longest_loss
from flops_lightning.settings import KeepsSettings
from flops_lightning.strategies.costs import LossCosts
from flops_lightning.strategies.sites import Site

Exchange = Literal["gradients", "losses"]
"""What ranks exchange: their gradients, or the scalars that weigh directions which every rank can draw."""
Normalize = Literal["none", "std"]
"""What an estimate is divided by: nothing, or the standard deviation of its weights."""


@dataclass(frozen=True, eq=False)
class Estimate:
    """Report of one call of ``estimate``; the gradient itself is in ``.grad``.

    Attributes:
        loss: ``(b,)`` clean losses.
        output: ``(b, ...)`` clean output of the network.
        queries: Queries spent, pilots left out.
        lost: Queries lost to non-finite losses, their antithetic partners included.
        silent_samples: (sample, site) pairs that contributed nothing because all their queries were lost.
        lost_batch: No query survived at any site: ``.grad`` is unchanged and the step should be skipped.
        observation: Traces estimated from these queries, if requested; NaN at sites that were not estimated and where
            several layers were perturbed together.

    Example:
        >>> report = Estimate(loss=torch.tensor([0.5, 1.5]), output=torch.zeros(2, 3), queries=8, lost=2)
        >>> float(report.loss.mean()), report.queries - report.lost
        (1.0, 6)
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

    Call ``bind`` once; for each batch ``clean_pass``, then ``estimate`` for each entry of ``update_groups``, with
    ``refresh`` in between if there are several.

    Attributes:
        communicator: The ranks that train together; see :meth:`join`.
        rank: Rank of the process; part of every noise key, so that ranks draw different directions.
        exchange: ``gradients``: ``.grad`` is that of this rank's samples, to be reduced over the ranks
            (:func:`flops_lightning.distributed.reduce_gradients`). ``losses``: it is already that of all ranks.
        sites: Sites from bottom to top; empty for a strategy without queries.
        exact_sites: Sites above these whose gradient is exact and costs no query: no budget, counts or traces.
        draw: Draw counter: number of batches so far, including skipped ones.
        meter: Costs so far.

    Example:
        All strategies are used in the same way; here exact gradients of ``mean(y - t)``:

        >>> from flops_lightning import Backprop, stage_network
        >>> network = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False))
        >>> strategy = Backprop()
        >>> strategy.bind(stage_network(network), loss=lambda output, target: (output - target).flatten())
        >>> clean = strategy.clean_pass(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(2, 1))
        >>> estimate = strategy.estimate(clean)
        >>> network[0].weight.grad
        tensor([[2., 3.]])
    """

    network: StagedNetwork
    loss: LossFunction
    communicator: Communicator = Communicator()
    rank: int = 0
    exchange: Exchange = "gradients"
    sites: tuple[Site, ...] = ()
    exact_sites: tuple[Site, ...] = ()
    draw: int = 0

    def __init__(self) -> None:
        self.meter = QueryMeter()
        self._loss_costs = LossCosts()

    @abstractmethod
    def bind(self, network: StagedNetwork, loss: LossFunction) -> None:
        """Resolve the settings against a network; the loss returns one value a row.

        Raises:
            SettingError: a setting does not fit the network.
        """

    def join(self, communicator: Communicator) -> None:
        """Train together with other ranks: directions differ from rank to rank, learned quantities are shared.

        Raises:
            SettingError: the ranks have different seeds.
        """
        self.communicator, self.rank = communicator, communicator.rank
        if hasattr(self, "seed"):  # ranks draw each other's directions again
            seeds = gather_plain(communicator, self.seed, device=next(self.network.module.parameters()).device)
            if len(set(seeds)) > 1:
                raise SettingError(
                    "model.strategy.seed", self.seed, f"the processes of this run have different seeds, {seeds}.",
                    "Call seed_everything with the same seed in each before the strategy is made, or give `seed`.",
                )  # fmt: skip

    def used_by_any(self, used: Sequence[bool]) -> list[bool]:
        """Which gradients to add: where ranks exchange losses, those that any rank has surviving queries for.

        Every rank must call this, and gets the same answer: a rank without queries draws the others' directions.
        """
        if self.exchange == "gradients" or self.communicator.size == 1:
            return list(used)
        device = next(iter(self.network.module.parameters())).device
        flags = torch.tensor([float(each) for each in used], device=device)
        return [bool(n) for n in self.communicator.sum(flags).tolist()]

    @property
    @abstractmethod
    def budget(self) -> QueryBudget | None:
        """Queries that an allocator may split, at each site, less the pilots; None for a strategy without queries."""

    @property
    @abstractmethod
    def update_groups(self) -> tuple[tuple[str, ...], ...]:
        """Names of the sites, exact ones included, to be estimated before each optimiser step, in order."""

    @property
    def sigmas(self) -> dict[str, float]:
        """Width of the noise at each site as it is set; empty without noise and where derivatives are exact."""
        return {site.name: site.sigma for site in self.sites if site.sigma}

    def set_sigmas(self, sigmas: Mapping[str, float]) -> None:
        """Set the width of the noise at sites by name; widths that are learned start from there."""
        self.sites = tuple(replace(site, sigma=sigmas.get(site.name, site.sigma)) for site in self.sites)

    @abstractmethod
    def clean_pass(self, inputs: Any, targets: Any) -> CleanPass:
        """Run the batch unperturbed and advance the draw counter.

        ``inputs`` are what the network takes: a ``(b, ...)`` tensor, a tuple of arguments or a mapping of named ones;
        ``targets`` a tensor or nested tensors with the same first dimension.
        """

    @abstractmethod
    def refresh(self, clean: CleanPass, updated: Sequence[str]) -> CleanPass:
        """The clean pass after the parameters of the sites ``updated`` changed."""

    @abstractmethod
    def pilot_traces(self, clean: CleanPass) -> TraceObservation | None:
        """Spend the pilots on this batch and return the traces that they show; None if there are no pilots."""

    @abstractmethod
    def sample_statistics(
        self, clean: CleanPass, names: Collection[str] = (), metric: Mapping[str, Tensor] | None = None
    ) -> SampleStatistics:
        """Spend the pilots, if any, and tell an allocator what is known of the samples before their queries.

        Args:
            clean: The batch's clean pass.
            names: Fields of :class:`SampleStatistics` to fill in addition to loss, embedding, traces and budget.
            metric: Weights of the squared derivatives, by parameter name, for ``preconditioned_scale``; None while the
                optimiser has none, where it is ``scale``.
        """

    @abstractmethod
    def estimate(
        self, clean: CleanPass, counts: Tensor | None = None, sites: Sequence[str] | None = None, *,
        pilot_weight: Tensor | None = None, inclusion: Tensor | None = None, traces: bool = False,
    ) -> Estimate:  # fmt: skip
        """Add the gradient estimate to ``.grad`` of the sites' parameters.

        Args:
            clean: The batch's clean pass.
            counts: ``(s, b)`` or ``(b,)`` integer queries of each sample (at each site); None: the budget in equal
                parts.
            sites: Names of the sites to estimate; None: all.
            pilot_weight: ``(s, b)`` weights of reused pilots, chosen independently of their losses; None: their share
                of the budget.
            inclusion: ``(s, b)`` probabilities with which the samples were given queries, by which the gradients of
                those that have some are divided (Horvitz and Thompson, 1952); None: 1 for all.
            traces: Also return the traces that these queries show.

        Raises:
            SettingError: counts of a wrong shape, not integers, negative, or not usable by the estimator; or an unknown
                site.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to draw the same noise and to continue the meter."""
        unit = {"unit": self._loss_costs.unit} if self._loss_costs.unit else {}
        return {"draw": self.draw, "meter": self.meter.state_dict(), **unit}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.draw = int(state["draw"])
        self._loss_costs = LossCosts(float(state.get("unit", 0.0)))
        self.meter.load_state_dict(state["meter"])


class ChunkedStrategy(ForwardGradientStrategy):
    """A strategy that runs forward passes with noise or masks: rows in chunks, and a seed.

    Attributes:
        draws: What the seed decides, in messages.
        least_rows: Fewest rows in a chunk.
    """

    draws: ClassVar[str] = "noise"
    least_rows: ClassVar[int] = 1

    def __init__(
        self, *, chunk_rows: RowsSetting = 256, seed: int | None = None, generator: GeneratorSetting = "auto"
    ) -> None:
        """Keep the settings.

        Args:
            chunk_rows: Upper bound of the rows in one forward pass; bounds the memory, never changes the estimate.
                ``auto``: as many as suit the device, chosen at the first batch.
            seed: Seed of all noise and masks; None: the seed of ``seed_everything``.
            generator: What draws the noise. ``philox``: the same numbers on every device, up to rounding; slow on a
                CPU. ``torch``: different numbers on each kind of device; slow on a GPU. ``auto``: ``torch`` on a CPU,
                else ``philox``.
        """
        super().__init__()
        self._generator, self.generator = GeneratorChoice(generator), generator
        self._chunks = ChunkRows(chunk_rows, least=self.least_rows)
        self._seed_given = seed is not None
        self.seed = torch.initial_seed() & 0x7FFFFFFF if seed is None else seed

    @property
    def chunk_rows(self) -> int:
        """Upper bound of the rows in one forward pass."""
        return self._chunks.rows

    def _settle(self, inputs: Any, targets: Any) -> None:
        """Choose what depends on the device, at the first batch."""
        self._generator.settle(inputs.device)
        self._chunks.settle(self.network, inputs, longest_loss(self.loss, targets))

    def state_dict(self) -> dict[str, Any]:
        """Draw counter, meter, seed, generator and chosen rows."""
        parts = self._generator.state_dict() | self._chunks.state_dict()
        return {**super().state_dict(), "seed": self.seed, **parts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; a seed that was given must be the same."""
        if self._seed_given and self.seed != state["seed"]:
            raise SettingError(
                "model.strategy.seed", self.seed, f"the resumed run draws its {self.draws} from the seed "
                f"{state['seed']}.", f"Leave the seed out, or write {state['seed']}.",
            )  # fmt: skip
        super().load_state_dict(state)
        self._chunks.load_state_dict(state)
        self._generator.load_state_dict(state)
        self.seed = int(state["seed"])


def refuse_second_network(bound: StagedNetwork | None, network: StagedNetwork) -> None:
    """Raise a :class:`SettingError` if the strategy is bound to another network: its sites hold those parameters."""
    if bound is not None and bound.module is not network.module:
        name = type(bound.module).__name__
        raise SettingError("model.strategy", name, "already serves another network.", "Make one for each network.")


def add_gradients(parameters: Mapping[str, nn.Parameter], gradients: Mapping[str, Tensor]) -> None:
    """Add to ``.grad`` as ``backward`` would."""
    for name, gradient in gradients.items():
        parameter = parameters[name]
        typed = gradient.to(parameter.dtype)
        parameter.grad = typed if parameter.grad is None else parameter.grad + typed


def warn_silent(number: int, what: str, *, smaller: str = "sigma or learning rate") -> None:
    """Warn of samples that contribute nothing to a step; to be called by an ``estimate`` under ``torch.no_grad``."""
    warnings.warn(
        f"{number} {what} lost every query to non-finite losses and contribute nothing to this step. A smaller "
        f"{smaller}, or a higher precision, keeps losses finite.",
        RuntimeWarning, stacklevel=4,  # past this function, the estimate and its decorator
    )  # fmt: skip
