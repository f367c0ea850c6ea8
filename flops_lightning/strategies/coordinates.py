"""``CoordinateFiniteDifferences``: DeepZero (Chen et al., ICLR 2024, arXiv 2310.02025).

At each step a random mask of coordinates ``j`` is measured, one after the other, on the whole batch (CGE, eq. 2),
strictly forward (no autograd)::

    forward:  g_j = [L(theta + step e_j) - L(theta)] / step
    central:  g_j = [L(theta + step e_j) - L(theta - step e_j)] / (2 step)

and every other coordinate gets zero. What lies below the stage that owns the coordinate is not run again (the paper's
feature reuse).
"""

import math
import warnings
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from flops_lightning.distributed import mean_over_ranks
from flops_lightning.errors import SettingError, check_at_least, check_choice, check_positive
from flops_lightning.meter import CLEAN
from flops_lightning.network.functional import FunctionalStages
from flops_lightning.network.rows import as_rows
from flops_lightning.network.staging import StagedNetwork
from flops_lightning.queries import CleanPass, LossFunction, clean_pass, longest_loss
from flops_lightning.strategies import coordinate_probes
from flops_lightning.strategies.base import ChunkedStrategy, Estimate, add_gradients, warn_silent
from flops_lightning.strategies.coordinate_probes import CoordinateProbes, Masks, Scheme, draw_masks
from flops_lightning.strategies.precision import resolution, rounded_up
from flops_lightning.strategies.whole_batch import WholeBatchStrategy
from flops_lightning.strategies.zo_grasp import kept_ratios, zo_grasp_scores
from flops_lightning.transfers import to_device

Ratios = Literal["zo_grasp", "uniform"]

COORDINATES, ZO_GRASP = "coordinates", "zo_grasp"  # names in the meter


class CoordinateFiniteDifferences(WholeBatchStrategy, ChunkedStrategy):
    """Coordinate-wise finite differences under a random mask.

    The estimate is the **masked** gradient: exact (as ``step -> 0``) at the coordinates of the mask and zero elsewhere.
    Its mean is each derivative times the probability that it is measured. ``rescale`` divides by this probability,
    which makes the estimate unbiased for the whole gradient, but very noisy if the mask is small.

    A coordinate costs a forward pass of the batch from its stage on, so a step costs at most ``coordinates`` of them
    (twice that with ``central``). Every coordinate needs all samples: there is nothing to allocate.

    Masks do not depend on the rank, so ranks with the same ratios measure the same coordinates, each on its own samples
    (ZO-GraSP's ratios come from each rank's own first batch).

    Example:
        >>> from flops_lightning import CoordinateFiniteDifferences, stage_network
        >>> network = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False))
        >>> strategy = CoordinateFiniteDifferences(coordinates=1, ratios="uniform", seed=0)
        >>> strategy.bind(stage_network(network), lambda output, target: (output - target)[:, 0])
        >>> strategy.estimate(strategy.clean_pass(torch.tensor([[3.0, 3.0]]), torch.tensor([[0.0]]))).queries
        1
        >>> sorted(round(entry, 1) for entry in network[0].weight.grad[0].tolist())  # 3 at one of two coordinates
        [0.0, 3.0]
    """

    why = "measures every coordinate on every sample"
    draws = "masks"
    fixed = frozenset({"generator"})

    def __init__(
        self,
        *, coordinates: int = 80, step: float = 1e-3, scheme: Scheme = "forward", ratios: Ratios = "zo_grasp",
        keep: float = 0.1, grasp_queries: int = 192, resample_every: int = 1, rescale: bool = False, **settings: Any,
    ) -> None:  # fmt: skip
        """Keep the settings; :meth:`bind` checks them against the network.

        Args:
            coordinates: Coordinates measured in a step.
            step: How far a coordinate is moved, in units of the parameter.
            scheme: ``forward`` (one query per sample and coordinate, first-order bias in the step) or ``central`` (two
                queries, second-order bias).
            ratios: How the mask is spread over the tensors: ``zo_grasp`` (by their share of the weights that survive
                ZO-GraSP, found once on the first batch) or ``uniform`` (all coordinates equally likely).
            keep: Share of all weights that survives ZO-GraSP, 0 to 1 (DeepZero: 0.1). Raised if the mask is larger.
            grasp_queries: Directions of ZO-GraSP's gradient estimates (DeepZero's code: 192).
            resample_every: Steps for which a mask is kept.
            rescale: Divide each derivative by the probability of its coordinate.
            **settings: See :class:`ChunkedStrategy`.
        """
        super().__init__(generator="auto", **settings)
        check_choice("model.strategy.scheme", scheme, get_args(Scheme))
        check_choice("model.strategy.ratios", ratios, get_args(Ratios))
        counts = {"coordinates": coordinates, "grasp_queries": grasp_queries, "resample_every": resample_every}
        for name, value in counts.items():
            check_at_least(f"model.strategy.{name}", value, 1)
        check_positive("model.strategy.step", step, "Write, for example, 0.001.")
        if not 0 < keep <= 1:
            raise SettingError("model.strategy.keep", keep, "must be in (0, 1].", "Write, for example, 0.1.")
        self.coordinates, self.step, self.keep, self.grasp_queries = coordinates, step, keep, grasp_queries
        self.scheme, self.ratios, self.resample_every, self.rescale = scheme, ratios, resample_every, rescale
        self._stage_of: dict[str, int] = {}
        self._from_stage: tuple[float, ...] = ()
        self._found_ratios: dict[str, float] | None = None

    def bind(self, network: StagedNetwork, loss: LossFunction) -> None:
        """Find the stage of each parameter; the mask may not have more coordinates than there are weights to train."""
        super().bind(network, loss)
        entries = sum(p.numel() for p in network.trainable().values())
        if entries < self.coordinates:
            raise SettingError(
                "model.strategy.coordinates", self.coordinates, f"exceeds the {entries} trainable weights.",
                f"Write {entries} or less, or freeze less.",
            )  # fmt: skip
        self._stages = FunctionalStages(network)
        names = [name for name, _ in network.module.named_parameters()]
        self._stage_of = {name: i for i, s in enumerate(network.stages) for name in names if s.owns(name)}
        self._from_stage, self._found_ratios = (), None

    def clean_pass(self, inputs: Any, targets: Any) -> CleanPass:
        """Run the batch unperturbed, keep what the masked coordinates start from, and advance the draw counter."""
        if not self._stage_of:
            raise RuntimeError("bind(network, loss) must come before the first clean_pass.")
        inputs = as_rows(inputs)
        self._chunks.settle(self.network, inputs, longest_loss(self.loss, targets))
        names = self.network.trainable() if self._ratios is None else self._masks(self.draw)
        keep = {self._stage_of[name] for name in names}
        clean = clean_pass(self.network, self.loss, inputs, targets, keep=keep, draw=self.draw, rows=self.chunk_rows)
        if not self._from_stage:
            costs = self._loss_costs.count(self.network, (), inputs, self.loss, targets, self.communicator)
            self._from_stage = costs.from_stage
            self._warn_unresolved_step()
        clean.activations.setdefault(0, inputs)
        self.draw += 1
        cost = clean.batch_size * self._from_stage[0] + self._loss_cost(clean)
        self.meter.add(CLEAN, clean_passes=clean.batch_size, forward_equivalents=cost)
        return clean

    def _estimate(self, clean: CleanPass) -> Estimate:
        """Add the masked gradient to ``.grad``; zeros outside of the mask.

        A query with a non-finite loss removes its sample from that coordinate's mean (central: with its partner): the
        term has weight zero, and the others keep theirs.
        """
        known = bool(torch.isfinite(clean.loss).any())
        with self.network.evaluating():
            if self._ratios is None:
                self._found_ratios = self._agreed(self._find_ratios(clean) if known else None)
            if not known:
                # Such a batch must not decide the ratios of the whole run.
                return Estimate(clean.loss, clean.output, 0, silent_samples=clean.batch_size, lost_batch=True)
            masks = self._masks(clean.draw)
            slopes = self._probes.slopes(clean, masks, step=self.step, scheme=self.scheme)
        used = torch.isfinite(torch.cat(list(slopes.values())))
        survivors, counting = torch.stack([used.sum(), used.any(0).sum()]).tolist()  # the only transfer
        evaluations = 2 if self.scheme == "central" else 1
        queries = used.numel() * evaluations
        lost, silent = queries - survivors * evaluations, clean.batch_size - counting
        cost = sum(len(masks[name]) * self._from_stage[self._stage_of[name]] for name in masks)
        cost = evaluations * (cost * clean.batch_size + sum(map(len, masks.values())) * self._loss_cost(clean))
        self.meter.add(COORDINATES, queries=queries, lost=lost, forward_equivalents=cost)
        if survivors:
            add_gradients(self.network.trainable(), self._gradients(masks, slopes))
        if silent:
            warn_silent(silent, "samples", smaller="learning rate")
        return Estimate(clean.loss, clean.output, queries, lost, silent, lost_batch=not survivors)

    def _gradients(self, masks: Masks, slopes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        gradients = {}
        probabilities = self._probabilities() if self.rescale else {}
        for name, parameter in self.network.trainable().items():
            flat = torch.zeros(parameter.numel(), dtype=parameter.dtype, device=parameter.device)
            if name in masks:
                rows = slopes[name]
                mean = torch.where(torch.isfinite(rows), rows, 0).mean(1) / probabilities.get(name, 1.0)
                flat[to_device(masks[name], flat.device)] = mean.to(flat.dtype)
            gradients[name] = flat.view(parameter.shape)
        return gradients

    def _agreed(self, ratios: dict[str, float] | None) -> dict[str, float] | None:
        """The mean ratios of the ranks that found any, so that all measure the same coordinates."""
        if self.communicator.size == 1:
            return ratios
        parameters = self.network.trainable()
        own = torch.tensor([ratios[name] for name in parameters] if ratios else [0.0] * len(parameters))
        device = next(iter(parameters.values())).device
        mean = mean_over_ranks(self.communicator, own.double().to(device), float(ratios is not None))
        found = dict(zip(parameters, mean.tolist(), strict=True))
        return None if math.isnan(mean[0]) else found

    def _find_ratios(self, clean: CleanPass) -> dict[str, float]:
        parameters = {name: p.detach() for name, p in self.network.trainable().items()}
        found = zo_grasp_scores(
            lambda values: self._probes.losses_at(clean, values), parameters, clean.loss,
            queries=self.grasp_queries, step=self.step, seed=self.seed,
        )  # fmt: skip
        cost = found.queries * (self._from_stage[0] + self._loss_cost(clean) / clean.batch_size)
        self.meter.add(ZO_GRASP, queries=found.queries, lost=found.lost, forward_equivalents=cost)
        entries = sum(p.numel() for p in parameters.values())
        return kept_ratios(found.scores, max(self.coordinates, round(self.keep * entries)))

    def _loss_cost(self, clean: CleanPass) -> float:
        """What one query of each sample pays for a loss that is the rest of the network."""
        return float(self._loss_costs.of(self.loss, clean.targets, clean.batch_size).sum())

    @property
    def _probes(self) -> CoordinateProbes:
        return CoordinateProbes(self.network, self.loss, self._stages, self._stage_of, self.chunk_rows)

    @property
    def _ratios(self) -> dict[str, float] | None:
        """Relative density of each tensor; None as long as ZO-GraSP has not been run."""
        return dict.fromkeys(self.network.trainable(), 1.0) if self.ratios == "uniform" else self._found_ratios

    def _sizes(self) -> dict[str, int]:
        return {name: p.numel() for name, p in self.network.trainable().items()}

    def _probabilities(self) -> dict[str, float]:
        ratios, sizes = self._ratios, self._sizes()
        if ratios is None:
            raise RuntimeError("the ratios are found in the first estimate.")
        if ratios.keys() != sizes.keys():
            raise SettingError(
                "freeze", sorted(ratios.keys() ^ sizes.keys()), "are not frozen as they were when ZO-GraSP ran.",
                "Freeze the same parameters as then, or write ratios: uniform.",
            )  # fmt: skip
        return coordinate_probes.inclusion_probabilities(sizes, ratios, self.coordinates)

    def _masks(self, draw: int) -> Masks:
        return draw_masks(self._sizes(), self._probabilities(), seed=self.seed, draw=draw // self.resample_every)

    def _warn_unresolved_step(self) -> None:
        trainable = self.network.trainable()
        convolutions = any(p.dim() > 3 for p in trainable.values())
        found = {name: (resolution(p, convolutions=convolutions), p) for name, p in trainable.items()}
        # A single weight moves the loss by little, beside what the rounding of a whole network does: see the docs.
        needed = {name: 10 * each.least_width(p) for name, (each, p) in found.items() if each is not None}
        worst = max(needed, key=needed.__getitem__)
        if self.step < needed[worst]:
            warnings.warn(
                f"model.strategy.step = {self.step:g} is below what the precision resolves at {worst!r}. Write "
                f"{rounded_up(needed[worst]):g} or more, or use a higher precision.",
                RuntimeWarning, stacklevel=3,
            )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Draw counter, meter, seed, chosen rows, and the ratios that ZO-GraSP found."""
        return {**super().state_dict(), "ratios": self._found_ratios}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; a seed that was given must be the same."""
        super().load_state_dict(state)
        self._found_ratios = None if state["ratios"] is None else dict(state["ratios"])
