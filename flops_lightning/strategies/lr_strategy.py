"""``LikelihoodRatio``: the likelihood-ratio estimator at ``linear``, ``block`` and ``group`` sites as a strategy.

Forward only through everything between a site and the loss. ``linear`` sites use no autograd at all; ``block`` and
``group`` sites use a local VJP inside the site, never through its suffix.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flops_lightning.allocators.base import QueryBudget
from flops_lightning.errors import SettingError
from flops_lightning.meter import CLEAN
from flops_lightning.noise import NoiseKey
from flops_lightning.queries import CleanPass, LossFunction, RowPlan, clean_pass, drop_rows, plan_rows, refresh
from flops_lightning.staging import StagedNetwork
from flops_lightning.strategies.base import Estimate, ForwardGradientStrategy, add_gradients, resolve_seed, summed
from flops_lightning.strategies.closed_form import layer_gradient, linear_gradient_sq_norm
from flops_lightning.strategies.costs import SiteCosts, site_costs
from flops_lightning.strategies.likelihood_ratio import DeltaSums, Variant, query_weights
from flops_lightning.strategies.local_vjp import local_vjp
from flops_lightning.strategies.perturbation import chunk_noise, clean_layer_input, perturbed_losses
from flops_lightning.strategies.precision import warn_unresolved_sigma
from flops_lightning.strategies.sites import Site, SiteSpec, resolve_sites


@dataclass
class PilotSpec:
    """Setting: queries spent before the allocation, to estimate each sample's trace.

    Attributes:
        site: Name of the site at which they are spent.
        queries: Pilots of each sample, taken from that site's budget; 0: none.
        reuse: Let them enter the gradient, with the weight ``queries / queries_per_sample`` fixed before they are seen
            (an adaptive weight would bias the estimate).
    """

    site: str = ""
    queries: int = 0
    reuse: bool = True


@dataclass(frozen=True, eq=False)
class _SiteResult:
    gradients: dict[str, Tensor]
    survivors: Tensor
    queries: int


class LikelihoodRatio(ForwardGradientStrategy):
    """Likelihood-ratio gradient estimates (FLOPS, eq. 1) from forward passes."""

    def __init__(
        self,
        *,
        sites: Sequence[SiteSpec] = (),
        variant: Variant = "baseline",
        update: Literal["simultaneous", "site_by_site"] = "simultaneous",
        pilots: PilotSpec | None = None,
        chunk_rows: int = 256,
        seed: int | None = None,
    ) -> None:
        """Keep the settings; they meet the network in :meth:`bind`.

        Args:
            sites: Where noise enters; empty: the paper's layout (three groups and the head).
            variant: The control variate: ``plain`` (none), ``baseline`` (clean loss), ``leave_one_out``, ``antithetic``.
            update: All sites from the same perturbed losses and one optimiser step, or one step for each site, from the top
                down, with new losses in between (FLOPS, algorithm 1).
            pilots: Queries spent before the allocation.
            chunk_rows: Upper bound of the rows in one forward pass; bounds the memory, never changes the estimate.
            seed: Seed of all noise; None: the seed of ``seed_everything``.

        Raises:
            SettingError: an unknown variant or update, or fewer than two rows in a chunk.
        """
        super().__init__()
        for name, value, choices in (
            ("variant", variant, get_args(Variant)),
            ("update", update, ("simultaneous", "site_by_site")),
        ):
            if value not in choices:
                raise SettingError(f"strategy.{name}", value, "is not known.", f"Choose from {list(choices)}.")
        if chunk_rows < 2:  # noqa: PLR2004
            raise SettingError("strategy.chunk_rows", chunk_rows, "is too small.", "Write 2 or more, for example 256.")
        self.specs = tuple(sites)
        self.variant: Variant = variant
        self.update = update
        self.pilots = pilots or PilotSpec()
        self.chunk_rows = chunk_rows
        self.seed = resolve_seed(seed)
        self._unit = 2 if variant == "antithetic" else 1
        self._sites: tuple[Site, ...] = ()
        self._costs: SiteCosts | None = None
        self._piloted: tuple[int, DeltaSums] | None = None

    # -- settings against the network ---------------------------------------------------------------------------------

    def bind(self, network: StagedNetwork, loss: LossFunction) -> None:
        """Resolve sites and pilots.

        Raises:
            SettingError: see :func:`resolve_sites`; or a budget that the variant cannot use, or pilots that cannot be taken.
        """
        self.network, self.loss = network, loss
        self._sites = resolve_sites(network, self.specs)
        self._costs = None
        for site in self._sites:
            if site.queries_per_sample % self._unit:
                raise SettingError(
                    "strategy.sites.queries_per_sample", site.queries_per_sample,
                    f"is odd at site {site.name!r}, antithetic queries come in pairs.", "Write an even number.",
                )  # fmt: skip
            if self.variant == "leave_one_out" and len(site.layers) > 1:
                raise SettingError(
                    "strategy.variant", self.variant, f"cannot centre the jointly perturbed layers of site {site.name!r}, "
                    "whose inputs differ from query to query.", "Use variant: baseline, or together: false.",
                )  # fmt: skip
        if self.pilots.queries:
            self._check_pilots()

    def _check_pilots(self) -> None:
        pilots, names = self.pilots, [site.name for site in self._sites]
        if pilots.site not in names:
            raise SettingError("strategy.pilots.site", pilots.site, "is not a site.", f"Choose from {names}.")
        site = self._sites[names.index(pilots.site)]
        if len(site.layers) > 1:
            raise SettingError(
                "strategy.pilots.site", pilots.site, "perturbs several layers together.", f"Choose from {names}."
            )
        least, most = 2 * self._unit, site.queries_per_sample - 2
        if not least <= pilots.queries <= most or pilots.queries % self._unit:
            raise SettingError(
                "strategy.pilots.queries", pilots.queries,
                f"must be a multiple of {self._unit} from {least} to {most} (two are left of the site's "
                f"{site.queries_per_sample}).", f"Write for example {least}, or 0 for none.",
            )  # fmt: skip
        if self.update == "site_by_site" and pilots.reuse and site is not self._sites[-1]:
            raise SettingError(
                "strategy.pilots.reuse", True, "pilots of a lower site are stale once the sites above it were updated.",
                f"Set reuse: false, or take the pilots at {names[-1]!r}.",
            )  # fmt: skip

    @property
    def sites(self) -> tuple[Site, ...]:
        """Sites from bottom to top."""
        return self._sites

    @property
    def budget(self) -> QueryBudget:
        """Queries of a sample at each site, pilots taken off."""
        return QueryBudget(
            tuple(site.queries_per_sample - self._pilot_queries(site) for site in self._sites),
            multiple=self._unit,
            minimum=2 if self.variant == "leave_one_out" else self._unit,
        )

    @property
    def update_groups(self) -> tuple[tuple[str, ...], ...]:
        """All sites at once, or one after the other from the top, so that the activations below stay valid."""
        names = tuple(site.name for site in self._sites)
        return (names,) if self.update == "simultaneous" else tuple((name,) for name in reversed(names))

    def _pilot_queries(self, site: Site) -> int:
        return self.pilots.queries if site.name == self.pilots.site else 0

    # -- the steps of one batch ----------------------------------------------------------------------------------------

    def clean_pass(self, inputs: Tensor, targets: Tensor) -> CleanPass:
        """Run the batch unperturbed, keep what the sites need, and advance the draw counter."""
        keep = {i for site in self._sites for i in (site.first, site.start)}
        clean = clean_pass(
            self.network, self.loss, inputs, targets, keep=keep, draw=self.draw, rows=self.chunk_rows
        )
        if self._costs is None:
            self._costs = site_costs(self.network, self._sites, inputs)
            warn_unresolved_sigma(self._sites, clean)
        self.draw += 1
        self.meter.add(CLEAN, clean_passes=clean.batch_size, forward_equivalents=clean.batch_size)
        return clean

    def refresh(self, clean: CleanPass, updated: Sequence[str]) -> CleanPass:
        """The clean pass after the parameters of ``updated`` changed: their prefix is kept, the rest runs again."""
        start = min(site.first for site in self._sites if site.name in updated)
        cost = self._known_costs().from_stage[start]
        self.meter.add(CLEAN, clean_passes=clean.batch_size, forward_equivalents=cost * clean.batch_size)
        return refresh(self.network, self.loss, clean, start, rows=self.chunk_rows)

    @torch.no_grad()
    def pilot_trace(self, clean: CleanPass) -> Tensor | None:
        """Spend the pilots and return ``(b,)`` traces of the covariance of one query's gradient at the pilot site.

        In parameter space at a single ``nn.Linear`` (FLOPS, theorem 1), in activation space (a proxy) elsewhere.
        """
        if not self.pilots.queries:
            return None
        site = next(site for site in self._sites if site.name == self.pilots.site)
        counts = np.full(clean.batch_size, self.pilots.queries)
        layer_input = self._linear_input(site, clean)
        with self.network.evaluating():
            sums = self._delta_sums(site, clean, counts, first_query=0, traces_at=layer_input, traces=True)
        self._piloted = (clean.draw, sums)
        queries = int(counts.sum())
        lost = queries - int(sums.survivors.sum())
        cost = queries * self._known_costs().query[site.name]
        self.meter.add(site.name, queries=queries, pilots=queries, lost=lost, forward_equivalents=cost)
        return sums.trace(_sq_norm(site, layer_input, sums.weighted), self._unit)

    @torch.no_grad()
    def estimate(
        self, clean: CleanPass, counts: Tensor | None = None, sites: Sequence[str] | None = None
    ) -> Estimate:
        """Add the likelihood-ratio estimate to ``.grad``.

        Raises:
            SettingError: counts of a wrong shape, negative, or not in antithetic pairs.
        """
        table = self._count_table(counts, clean)
        chosen = [i for i, site in enumerate(self._sites) if sites is None or site.name in sites]
        with self.network.evaluating():
            results = [self._site_estimate(self._sites[i], clean, table[i]) for i in chosen]
        # The only transfer of the estimate: who survived, all sites at once.
        survivors = torch.stack([result.survivors for result in results]).cpu().numpy()
        for i, result, alive in zip(chosen, results, survivors, strict=True):
            site = self._sites[i]
            lost = int(table[i].sum() - alive.sum())
            cost = result.queries * self._known_costs().query[site.name]
            cost += clean.batch_size * self._known_costs().gradient[site.name]
            self.meter.add(site.name, queries=result.queries, lost=lost, forward_equivalents=cost)
            if alive.any() or self._piloted_for(site, clean) is not None:
                add_gradients(site.parameters, result.gradients)
        planned = table[chosen]
        silent = int(((survivors == 0) & (planned > 0)).sum())
        estimate = Estimate(
            loss=clean.loss,
            output=clean.output,
            queries=sum(result.queries for result in results),
            lost=int(planned.sum() - survivors.sum()),
            silent_samples=silent,
            lost_batch=not survivors.any(),
        )
        if silent:
            warnings.warn(
                f"{silent} (sample, site) pairs lost every query to non-finite losses and contribute nothing to this step. "
                "A smaller sigma or learning rate, or a higher precision, keeps losses finite.",
                RuntimeWarning, stacklevel=2,
            )  # fmt: skip
        return estimate

    # -- one site ------------------------------------------------------------------------------------------------------

    def _site_estimate(self, site: Site, clean: CleanPass, counts: NDArray[np.int64]) -> _SiteResult:
        first = self._pilot_queries(site) if self._piloted_for(site, clean, reused=False) is not None else 0
        if len(site.layers) > 1:
            return self._joint_layers(site, clean, counts)
        sums = self._delta_sums(site, clean, counts, first_query=first)
        delta = self._with_pilots(site, clean, sums) / clean.batch_size
        if site.layers:
            x = clean_layer_input(self.network, site, clean, rows=self.chunk_rows)
            gradients = _prefixed(site, layer_gradient(site.layers[0].module, x, delta))
        else:
            gradients = local_vjp(self.network, site, clean, delta, rows=self.chunk_rows)
        return _SiteResult(gradients, sums.survivors, int(counts.sum()))

    def _delta_sums(
        self,
        site: Site,
        clean: CleanPass,
        counts: NDArray[np.int64],
        *,
        first_query: int,
        traces: bool = False,
        traces_at: Tensor | None = None,
    ) -> DeltaSums:
        key = NoiseKey(self.seed, clean.draw, site.name, self.rank)
        sums: DeltaSums | None = None
        for chunk in plan_rows(counts, self.chunk_rows, first_query=first_query, multiple=self._unit):
            draw = chunk_noise(key, chunk, antithetic=self._unit == 2)  # noqa: PLR2004
            losses, (perturbation,) = perturbed_losses(self.network, self.loss, site, clean, chunk, draw)
            index = torch.from_numpy(chunk.samples).to(losses.device, non_blocking=True)
            weights, alive = self._weights(site, clean, losses, index, chunk.rows)
            if sums is None:
                sums = DeltaSums.empty(clean.batch_size, perturbation.z, variant=self.variant)
            norms = None
            if traces:
                x = None if traces_at is None else traces_at.index_select(0, index)
                norms = _sq_norm(site, x, perturbation.z)
            sums.add(chunk, perturbation.z, weights, alive, norms, self._unit)
        if sums is None:
            raise SettingError("counts", counts.tolist(), f"site {site.name!r} gets no query.", "Give it at least one.")
        return sums

    def _joint_layers(self, site: Site, clean: CleanPass, counts: NDArray[np.int64]) -> _SiteResult:
        """Layers perturbed in one query: the inputs of later ones move with the noise, so each row brings its own ``x``.

        A sample's divisor is the number of its survivors, known only at the end; if any query was lost, the survivors run
        again (the same noise, drawn from its keys).
        """
        plan = plan_rows(counts, self.chunk_rows, multiple=self._unit)
        spent = 0
        alive_counts = counts
        while len(plan.samples):
            spent += len(plan.samples)
            gradients, alive = self._joint_pass(site, clean, plan, alive_counts)
            if alive.all():
                break
            plan = drop_rows(plan, ~alive)
            alive_counts = np.bincount(plan.samples, minlength=clean.batch_size)
        else:
            gradients = {name: torch.zeros_like(p) for name, p in site.parameters.items()}
        return _SiteResult(gradients, torch.from_numpy(alive_counts).to(clean.loss), spent)

    def _joint_pass(
        self, site: Site, clean: CleanPass, plan: RowPlan, counts: NDArray[np.int64]
    ) -> tuple[dict[str, Tensor], NDArray[np.bool_]]:
        key = NoiseKey(self.seed, clean.draw, site.name, self.rank)
        divisor = torch.from_numpy(counts).to(clean.loss) * clean.batch_size
        gradients: dict[str, Tensor] = {}
        alive_rows: list[Tensor] = []
        for chunk in plan:
            draw = chunk_noise(key, chunk, antithetic=self._unit == 2)  # noqa: PLR2004
            losses, perturbations = perturbed_losses(self.network, self.loss, site, clean, chunk, draw)
            index = torch.from_numpy(chunk.samples).to(losses.device, non_blocking=True)
            weights, alive = self._weights(site, clean, losses, index, chunk.rows)
            weights = weights / divisor[index]
            parts = [gradients]
            for p in perturbations:
                assert p.layer is not None and p.x is not None  # noqa: S101, PT018  joint sites perturb layers
                delta = weights.to(p.z.dtype).view(-1, *(1,) * (p.z.dim() - 1)) * p.z
                parts.append(_prefixed_layer(p.layer.name, layer_gradient(p.layer.module, p.x, delta)))
            gradients = summed(parts)
            alive_rows.append(alive[: chunk.rows])
        return gradients, torch.cat(alive_rows).cpu().numpy()

    def _weights(
        self, site: Site, clean: CleanPass, losses: Tensor, index: Tensor, rows: int
    ) -> tuple[Tensor, Tensor]:
        real = torch.arange(len(losses), device=losses.device) < rows
        return query_weights(losses, clean.loss[index], real, sigma=site.sigma, variant=self.variant)

    # -- pilots and counts ---------------------------------------------------------------------------------------------

    def _piloted_for(self, site: Site, clean: CleanPass, *, reused: bool = True) -> DeltaSums | None:
        if self._piloted is None or self._piloted[0] != clean.draw or site.name != self.pilots.site:
            return None
        return self._piloted[1] if self.pilots.reuse or not reused else None

    def _with_pilots(self, site: Site, clean: CleanPass, sums: DeltaSums) -> Tensor:
        """``alpha mean(pilots) + (1 - alpha) mean(rest)``, alpha fixed in advance: unbiased though counts saw the pilots."""
        pilots = self._piloted_for(site, clean)
        if pilots is None:
            return sums.delta()
        alpha = torch.full_like(sums.survivors, self.pilots.queries / site.queries_per_sample)
        alpha = torch.where(pilots.survivors > 0, alpha, 0.0)
        alpha = torch.where(sums.survivors > 0, alpha, 1.0).view(-1, *(1,) * (sums.weighted.dim() - 1))
        return alpha * pilots.delta() + (1 - alpha) * sums.delta()

    def _linear_input(self, site: Site, clean: CleanPass) -> Tensor | None:
        if site.layers and isinstance(site.layers[0].module, nn.Linear):
            return clean_layer_input(self.network, site, clean, rows=self.chunk_rows)
        return None

    def _count_table(self, counts: Tensor | None, clean: CleanPass) -> NDArray[np.int64]:
        shape = (len(self._sites), clean.batch_size)
        if counts is None:
            taken = [0 if self._piloted_for(s, clean, reused=False) is None else self.pilots.queries for s in self._sites]
            rest = [[site.queries_per_sample - t] for site, t in zip(self._sites, taken, strict=True)]
            return np.broadcast_to(np.array(rest, dtype=np.int64), shape).copy()
        table = counts.cpu().numpy().astype(np.int64)
        if table.shape not in (shape, shape[1:]):
            raise SettingError(
                "counts", tuple(table.shape), f"does not fit {shape[0]} sites and {shape[1]} samples.",
                f"Give integer counts of shape {shape} or {shape[1:]}.",
            )  # fmt: skip
        if (table < 0).any() or (table % self._unit).any():
            raise SettingError(
                "counts", table.tolist(), f"must be non-negative multiples of {self._unit}.",
                "Round with allocators.rounding.largest_remainder.",
            )  # fmt: skip
        return np.broadcast_to(table, shape).copy()

    def _known_costs(self) -> SiteCosts:
        if self._costs is None:
            raise RuntimeError("clean_pass must come first: it counts the costs.")
        return self._costs

    def state_dict(self) -> dict[str, Any]:
        """Draw counter, meter, and the seed of the noise."""
        return {**super().state_dict(), "seed": self.seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self.seed = int(state["seed"])


def _prefixed_layer(layer: str, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{layer}.{leaf}": gradient for leaf, gradient in gradients.items()}


def _prefixed(site: Site, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return _prefixed_layer(site.layers[0].name, gradients)


def _sq_norm(site: Site, x: Tensor | None, delta: Tensor) -> Tensor:
    """``(r,)`` squared norms: of the parameter gradient where ``x`` is given (an ``nn.Linear``), else of ``delta``."""
    if x is None:
        return delta.flatten(1).square().sum(1)
    return linear_gradient_sq_norm(x.to(delta.dtype), delta, bias=f"{site.layers[0].name}.bias" in site.parameters)
