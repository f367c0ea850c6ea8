"""``MeZO``: two queries per step, all parameters, directions replayed from seeds (Malladi et al., NeurIPS 2023).

With one direction ``z ~ N(0, I)`` over all trainable parameters for the whole batch::

    grad = [L(theta + sigma z) - L(theta - sigma z)] z / (2 sigma)        L = 1 / B  sum_b L_b

One scalar a step; with ``queries = n`` the mean over ``n / 2`` directions (n-SPSA, the paper's "Mezo (n-SPSA)").
It is
:class:`SPSA` with shared noise on one site that is the whole network, without a clean pass and without an allocator.

With ``variant: baseline`` queries are one-sided, ``n`` directions ``z_q`` for one clean pass more::

    grad = 1 / n  sum_q [L(theta + sigma z_q) - L(theta)] z_q / sigma

``normalize: std`` divides by the standard deviation over the directions. With the difference quotients ``w_p`` of the
batch's loss along ``N`` directions (``n / 2`` pairs, or ``n``)::

    grad = 1 / N  sum_p w_p z_p / s        s^2 = 1 / (N - 1)  sum_p (w_p - mean_p w)^2

``w_p`` has mean 0 and variance ``|g|^2``, so it is an estimate of ``g / |g|`` (biased, since ``s`` and ``w`` are
dependent): a fixed rate takes long steps where the loss is flat. It matters to SGD, not to Adam or Muon.

FZOO (Dang et al., ICLR 2026, arXiv 2506.09034) is ``variant: baseline``, ``distribution: rademacher`` and ``normalize:
std`` under SGD. There ``s`` is that of the losses themselves, ``sigma`` times this one: its rate is ``sigma`` times
ours.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from flops_lightning.errors import SettingError, check_at_least, check_choice, check_positive
from flops_lightning.meter import CLEAN
from flops_lightning.network.functional import FunctionalStages
from flops_lightning.network.rows import as_rows, joined
from flops_lightning.network.staging import StagedNetwork
from flops_lightning.noise.keys import NoiseKey
from flops_lightning.noise.kinds import Distribution, NoiseSpec
from flops_lightning.phases import phase
from flops_lightning.queries import CleanPass, LossFunction, clean_pass, plan_rows
from flops_lightning.strategies.base import ChunkedStrategy, Estimate, Exchange, Normalize, add_gradients, warn_silent
from flops_lightning.strategies.parameter_queries import Response
from flops_lightning.strategies.precision import warn_unresolved_sigma
from flops_lightning.strategies.shared_directions import SharedDirections
from flops_lightning.strategies.site_specs import SiteSpec
from flops_lightning.strategies.sites import resolve_sites
from flops_lightning.strategies.whole_batch import WholeBatchStrategy
from flops_lightning.suffix_loss import SuffixLoss

Sides = Literal["antithetic", "baseline"]
SITE = "all"


class MeZO(WholeBatchStrategy, ChunkedStrategy):
    """Memory-efficient zeroth-order estimates; no autograd anywhere.

    Needs only the memory of inference: directions are drawn stage by stage, and again for the gradient. Antithetic
    pairs need no unperturbed pass; the reported loss is the mean of the two losses of the first direction, the reported
    output that of its ``+z`` pass. With ``variant: baseline`` both are those of the clean pass.

    Example:
        >>> from flops_lightning import MeZO, stage_network
        >>> network = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False))
        >>> strategy = MeZO(queries=2000, seed=0)
        >>> strategy.bind(stage_network(network), lambda output, target: (output - target)[:, 0])
        >>> strategy.estimate(strategy.clean_pass(torch.tensor([[3.0]]), torch.tensor([[0.0]]))).queries
        2000
        >>> round(network[0].weight.grad.item())  # the derivative of 3 w
        3
    """

    why = "gives all samples the same directions"
    instead = "SPSA"

    def __init__(
        self, *, sigma: float = 1e-3, queries: int = 2, variant: Sides = "antithetic",
        distribution: Distribution = "gaussian", normalize: Normalize = "none", exchange: Exchange = "gradients",
        **settings: Any,
    ) -> None:  # fmt: skip
        """Keep the settings; :meth:`bind` checks them against the network.

        Args:
            sigma: Standard deviation of the noise on every parameter.
            queries: Queries of every sample per step; 2 in the original.
            variant: ``antithetic``: in pairs ``+z`` and ``-z``. ``baseline``: one-sided, against the clean loss.
            distribution: ``gaussian``, or ``rademacher``: entries +1 and -1, unbiased only as sigma -> 0.
            normalize: ``none``, or ``std``: divide by the standard deviation over the directions of this process, of
                which there must be at least two.
            exchange: What processes send each other: ``gradients``, or ``losses``: one scalar per direction, whatever
                the number of parameters, from which every process redraws the directions of all others.
            **settings: See :class:`ChunkedStrategy`.
        """
        super().__init__(**settings)
        check_positive("model.strategy.sigma", sigma, "Write, for example, 1.0e-3.")
        check_choice("model.strategy.variant", variant, get_args(Sides))
        check_choice("model.strategy.distribution", distribution, get_args(Distribution))
        check_at_least("model.strategy.queries", queries, 1)
        self.unit = 2 if variant == "antithetic" else 1
        if queries % self.unit:
            remedy = "Write 2, 4, ..., or variant: baseline."
            raise SettingError("model.strategy.queries", queries, "must be even and 2 or more.", remedy)
        check_choice("model.strategy.exchange", exchange, get_args(Exchange))
        check_choice("model.strategy.normalize", normalize, get_args(Normalize))
        if normalize == "std" and queries < 2 * self.unit:
            problem = f"needs two directions or more, and queries = {queries} is one."
            remedy = f"Write queries: {2 * self.unit} or more, or none."
            raise SettingError("model.strategy.normalize", normalize, problem, remedy)
        self.sigma, self.queries, self.normalize, self.exchange = sigma, queries, normalize, exchange
        self.variant: Sides = variant
        self.distribution: Distribution = distribution

    def bind(self, network: StagedNetwork, loss: LossFunction) -> None:
        """Make one site from the lowest stage with trainable parameters on; what is below it runs once per batch."""
        super().bind(network, loss)
        trained = (i for i, stage in enumerate(network.stages) if any(stage.owns(n) for n in network.trainable()))
        first = next(trained, 0)
        ends = [network.stages[first].name, network.stages[-1].name]
        spec = SiteSpec(stages=ends, sigma=self.sigma, queries_per_sample=self.queries, name=SITE)
        self.sites = resolve_sites(network, [spec], in_parameters=True)
        self._stages = FunctionalStages(network)
        self._warned = False
        self._from_stage: tuple[float, ...] = (1.0,)

    def set_sigmas(self, sigmas: Mapping[str, float]) -> None:
        """Set the one width of all parameters."""
        super().set_sigmas(sigmas)
        self.sigma = self.sites[0].sigma

    def clean_pass(self, inputs: Any, targets: Any) -> CleanPass:
        """Run the batch for one-sided queries; for pairs what is frozen below, and the losses stay unknown (NaN)."""
        inputs = as_rows(inputs)
        self._settle(inputs, targets)
        dtype = torch.promote_types(next(iter(self.sites[0].parameters.values())).dtype, torch.float32)
        unknown = torch.full((len(inputs),), torch.nan, dtype=dtype, device=inputs.device)
        clean = CleanPass(targets, {0: inputs}, unknown[:, None], unknown, unknown[:, None], self.draw)
        (site,) = self.sites
        if not self._warned:
            warn_unresolved_sigma(self.sites, clean)
            self._warned = True
            if site.first or isinstance(self.loss, SuffixLoss):
                costs = self._loss_costs.count(self.network, (), inputs, self.loss, targets, self.communicator)
                self._from_stage = costs.from_stage
        if self.variant == "baseline":
            of_batch = (self.network, self.loss, inputs, targets)
            clean = clean_pass(*of_batch, keep={site.first} - {0}, draw=self.draw, rows=self.chunk_rows)
            clean.activations.setdefault(0, inputs)
            cost = self._pass_cost(clean, 0)
            self.meter.add(CLEAN, clean_passes=len(inputs), forward_equivalents=cost)
        elif site.first:
            with self.network.evaluating(), torch.no_grad():
                # A copy, since a stage may work in place.
                parts = [self.network.run(part.clone(), 0, site.first) for part in inputs.split(self.chunk_rows)]
            clean.activations[site.first] = joined(parts)
            below = self._from_stage[0] - self._from_stage[site.first]
            self.meter.add(CLEAN, forward_equivalents=len(inputs) * below)
        self.draw += 1
        return clean

    def _pass_cost(self, clean: CleanPass, start: int) -> float:
        """Cost of a forward pass of the batch from a stage to the losses."""
        samples = clean.batch_size
        of_loss = self._loss_costs.of(self.loss, clean.targets, samples)
        return self._from_stage[start] * samples + float(of_loss.sum())

    def _estimate(self, clean: CleanPass) -> Estimate:
        (site,) = self.sites
        first_outputs: list[Tensor] = []
        wanted = 2 * -(-clean.batch_size // self.chunk_rows) if self.unit == 2 else 0

        def loss(output: Tensor, targets: Tensor) -> Tensor:
            if len(first_outputs) < wanted:  # of the first direction, + and - in turn
                first_outputs.append(output)
            return self.loss(output, targets)

        key, noise = NoiseKey(self.seed, 0, "", self.rank, self.generator), NoiseSpec(self.distribution)
        ranks = self.communicator if self.exchange == "losses" else None
        shared = (self.network, self._stages, loss, key, self.unit, self.chunk_rows, Response(self.variant), ranks)
        layout = SharedDirections(*shared, noise=noise)
        plan = plan_rows(np.full(clean.batch_size, self.queries), self.chunk_rows, multiple=self.unit)
        with self.network.evaluating():
            losses = layout.run(site, clean, plan, traces=False).values.view(clean.batch_size, -1, self.unit)
        if self.unit == 2:
            slopes = (losses[..., 0] - losses[..., 1]) / (2 * self.sigma)
        else:
            slopes = (losses[..., 0] - clean.loss[:, None]) / self.sigma
        alive = torch.isfinite(slopes)
        pairs = alive.sum(1, keepdim=True)
        slopes = torch.where(alive, slopes, 0.0) / pairs.clamp(min=1) / clean.batch_size
        if self.normalize == "std":
            slopes = slopes / (slopes.sum(0) * slopes.shape[1]).std().clamp(min=torch.finfo(slopes.dtype).tiny)
        # The direction of a pair stands in its first row.
        coefficients = torch.nn.functional.pad(slopes[..., None], (0, self.unit - 1)).flatten()
        with phase("accumulation"):
            gradients = layout.gradient(site, clean, plan, coefficients, None)
        survivors = pairs[:, 0].cpu()
        spent = self.queries * clean.batch_size
        lost = spent - self.unit * int(survivors.sum())
        cost = self.queries * self._pass_cost(clean, site.first)
        self.meter.add(SITE, queries=spent, lost=lost, forward_equivalents=cost)
        silent = int((survivors == 0).sum())
        (used,) = self.used_by_any([silent < clean.batch_size])
        if used:
            add_gradients(site.parameters, gradients)
        if silent:
            warn_silent(silent, "samples")
        loss_seen, output = clean.loss, clean.output
        if self.unit == 2:
            loss_seen, output = losses[:, 0].mean(1), torch.cat(first_outputs[::2])
        return Estimate(loss_seen, output, spent, lost, silent, lost_batch=not used)
