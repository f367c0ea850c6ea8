"""Run all queries of one site in a step, in chunks, and sum them per sample."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flops_lightning.network.staging import StagedNetwork
from flops_lightning.noise.generators import GeneratorSetting
from flops_lightning.noise.keys import NoiseKey
from flops_lightning.noise.kinds import NoiseSpec
from flops_lightning.phases import phase
from flops_lightning.queries import Chunk, CleanPass, LossFunction, RowPlan, plan_rows, rows_of
from flops_lightning.strategies.delta import DeltaSums, Variant, column, query_weights
from flops_lightning.strategies.engine import SiteGradient, summed
from flops_lightning.strategies.perturbation import (
    ChunkNoise,
    DrawNoise,
    Perturbation,
    clean_layer_input,
    perturbed_losses,
)
from flops_lightning.strategies.sites import Site
from flops_lightning.strategies.vjp import graph_rows, layer_gradient, linear_gradient_sq_norm, local_vjp
from flops_lightning.strategies.widths import SiteWidth
from flops_lightning.transfers import to_device


@dataclass(frozen=True, eq=False)
class OutputQueryResult:
    """Result of queries with noise at a site's output.

    ``layer_input`` ``(b, ..., i)`` is the layer's clean input where traces are taken in parameter space, else None.
    """

    site: Site
    sums: DeltaSums
    unit: int
    layer_input: Tensor | None = None

    @property
    def survivors(self) -> Tensor:
        """``(b,)`` queries that count."""
        return self.sums.survivors

    @property
    def found(self) -> Tensor:
        """``(b,)`` whether a sample has an estimate."""
        return self.sums.found

    @property
    def small(self) -> bool:
        """False: sums at a site's output are often larger than the gradient of its parameters."""
        return False

    def trace(self) -> Tensor:
        """``(b,)`` unbiased trace of the covariance of one query's gradient; NaN with fewer than two units."""
        return self.sums.trace(sq_norm(self.site, self.layer_input, self.sums.weighted), self.unit)

    def sharing(self, gradients: Mapping[str, Tensor]) -> float:
        """Unknown: noise at outputs is each row's own."""
        del gradients
        return math.nan


@dataclass(frozen=True, eq=False)
class SiteQueries:
    """Runs the likelihood-ratio queries of a site; holds no state."""

    network: StagedNetwork
    loss: LossFunction
    variant: Variant
    chunk_rows: int
    seed: int
    rank: int
    noise: NoiseSpec = field(default_factory=NoiseSpec)
    widths: Mapping[str, SiteWidth] = field(default_factory=dict)
    token_squares: bool = False
    slopes: bool = False
    generator: GeneratorSetting = "auto"

    def width(self, site: Site) -> SiteWidth:
        """Present width of the noise at a site."""
        return self.widths.get(site.name) or SiteWidth(site.sigma)

    @property
    def unit(self) -> int:
        """Rows per independent unit: 2 in antithetic pairs, else 1."""
        return 2 if self.variant == "antithetic" else 1

    def sums(
        self, site: Site, clean: CleanPass, counts: NDArray[np.int64], *, first_query: int = 0, traces: bool = False,
        layer_input: Tensor | None = None,
    ) -> DeltaSums | None:  # fmt: skip
        """Sums over the queries of each sample at the output of a block, a group or a single layer.

        None where no sample has a query. With ``layer_input`` ``(b, ..., i)`` norms for traces are taken in parameter
        space.
        """
        with rows_of(self.network, self.loss, self._key(site, clean)):
            return self._sums(site, clean, counts, first_query=first_query, traces=traces, layer_input=layer_input)

    def _sums(
        self, site: Site, clean: CleanPass, counts: NDArray[np.int64], *, first_query: int, traces: bool,
        layer_input: Tensor | None,
    ) -> DeltaSums | None:  # fmt: skip
        sums: DeltaSums | None = None
        for chunk in plan_rows(counts, self.chunk_rows, first_query=first_query, multiple=self.unit):
            weights, alive, (perturbation,), index = self._run(site, clean, chunk)
            z = perturbation.z
            if sums is None:
                sums = DeltaSums.empty(
                    clean.batch_size, z, variant=self.variant, tokens=self.token_squares, slopes=self.slopes
                )
            with phase("accumulation"):
                lines = index - int(chunk.samples[0])
                changes = self._changes(site, weights, alive, clean.loss[index]) if self.slopes else None
                if perturbation.again is not None:
                    perturbation.again.add_to(sums, chunk, lines, weights, alive, changes, traces=traces)
                    continue
                norms = None
                if traces:
                    x = None if layer_input is None else layer_input.index_select(0, index)
                    norms = sq_norm(site, x, z)
                if changes is not None:
                    changes = changes * (self.width(site).unscaled(z).flatten(1).square().sum(1) - z[0].numel())
                sums.add(chunk, lines, z, weights, alive, norms, self.unit, changes)
        return sums

    def _changes(self, site: Site, weights: Tensor, alive: Tensor, clean: Tensor) -> Tensor:
        """``(r,)`` ``L - L_clean``, zero on rows that do not count."""
        change = weights * self.width(site).sigma
        # Weights of the plain variant have no control variate.
        return change - torch.where(alive, clean, 0.0) if self.variant == "plain" else change

    def query(
        self, site: Site, clean: CleanPass, counts: NDArray[np.int64], *, first_query: int = 0, traces: bool = False
    ) -> OutputQueryResult | None:
        """Run queries at the output of a block, a group or a single layer; see :class:`QueryEngine`."""
        x = None
        if traces and counts.any() and in_parameter_space(site):
            x = clean_layer_input(self.network, site, clean, rows=self.chunk_rows)
        sums = self.sums(site, clean, counts, first_query=first_query, traces=traces, layer_input=x)
        return None if sums is None else OutputQueryResult(site, sums, self.unit, x)

    def mixed_gradient(
        self, site: Site, clean: CleanPass, parts: Sequence[tuple[OutputQueryResult, Tensor]]
    ) -> dict[str, Tensor]:
        """``1/B sum_b J_b^T sum_parts share_b delta_b`` by parameter name."""
        layer_input = next((part.layer_input for part, _ in parts if part.layer_input is not None), None)
        with phase("accumulation"):
            # In place: these are as large as the activations of the batch.
            total, *others = (
                part.sums.delta().mul_(column(share / len(share), part.sums.weighted)) for part, share in parts
            )
            for other in others:
                total += other
            if self.network.live is not None and total.dim() == 3:  # others would add noise and no gradient
                total *= self.network.live(clean.targets, total.shape[1], site.start)[..., None]
        return self.gradient(site, clean, total, layer_input)

    def gradient(
        self, site: Site, clean: CleanPass, delta: Tensor, layer_input: Tensor | None = None
    ) -> dict[str, Tensor]:
        """``sum_b J_b^T delta_b`` by parameter name: closed form at a single layer, local VJP at a block or group.

        ``delta`` ``(b, ...)`` is at the site's active output; ``layer_input`` ``(b, ..., i)`` is computed unless it
        is given.
        """
        with phase("local VJP"):
            if not site.layers:
                return local_vjp(self.network, site, clean, delta, rows=graph_rows(site, self.chunk_rows))
            x = layer_input
            if x is None:
                x = clean_layer_input(self.network, site, clean, rows=self.chunk_rows)
            return _trained(site, site.layers[0].name, layer_gradient(site.layers[0].module, x, delta))

    def joint(self, site: Site, clean: CleanPass, counts: NDArray[np.int64]) -> SiteGradient:
        """Gradient of layers perturbed in one query.

        Each row brings its own ``x``, since that of later layers moves with the noise. A sample's divisor is the number
        of its survivors, known only at the end; if any query was lost, the survivors run again with the same noise,
        drawn from its keys.
        """
        plan, spent = plan_rows(counts, self.chunk_rows, multiple=self.unit), 0
        while len(plan.samples):
            spent += len(plan.samples)
            with rows_of(self.network, self.loss, self._key(site, clean)):
                gradients, alive = self._joint_pass(site, clean, plan, counts)
            if alive.all():
                return SiteGradient(partial(dict, gradients), to_device(counts, clean.loss), spent)
            plan = replace(plan, samples=plan.samples[alive], queries=plan.queries[alive])
            counts = np.bincount(plan.samples, minlength=clean.batch_size)
        nothing = {name: torch.zeros_like(p) for name, p in site.parameters.items()}
        return SiteGradient(partial(dict, nothing), torch.zeros_like(clean.loss), spent)

    def _joint_pass(
        self, site: Site, clean: CleanPass, plan: RowPlan, counts: NDArray[np.int64]
    ) -> tuple[dict[str, Tensor], NDArray[np.bool_]]:
        divisor = to_device(counts, clean.loss) * clean.batch_size
        gradients: dict[str, Tensor] = {}
        alive_rows: list[Tensor] = []
        for chunk in plan:
            weights, alive, perturbations, index = self._run(site, clean, chunk)
            with phase("accumulation"):
                scaled = weights / divisor[index]
                gradients = summed([gradients, *(_row_gradient(site, p, scaled) for p in perturbations)])
            alive_rows.append(alive[: chunk.rows])
        return gradients, torch.cat(alive_rows).cpu().numpy()

    def _run(self, site: Site, clean: CleanPass, chunk: Chunk) -> tuple[Tensor, Tensor, list[Perturbation], Tensor]:
        draw = ChunkNoise(self._key(site, clean), chunk, self.noise, self.unit)
        index = to_device(chunk.samples, clean.loss.device)
        real = torch.arange(len(index), device=index.device) < chunk.rows
        weights, alive, perturbations = self.weights(site, clean, index, draw, real, chunk.samples)
        return weights, alive, perturbations, index

    def _key(self, site: Site, clean: CleanPass) -> NoiseKey:
        return NoiseKey(self.seed, clean.draw, site.name, self.rank, self.generator)

    def weights(
        self, site: Site, clean: CleanPass, index: Tensor, draw: DrawNoise, real: Tensor, samples: NDArray[np.int64]
    ) -> tuple[Tensor, Tensor, list[Perturbation]]:
        """Weights of the noise that ``draw`` makes, and which rows count.

        ``index`` ``(r,)`` are the places of the rows' samples, ``samples`` the same on the host; ``real`` ``(r,)`` is
        False on padding.

        Returns:
            ``(r,)`` weights, zero on rows that do not count; the ``(r,)`` mask of rows that do; and the noise.
        """
        width = self.width(site)
        losses, perturbations = perturbed_losses(self.network, self.loss, site, clean, index, draw, width, samples)
        return *query_weights(losses, clean.loss[index], real, sigma=width.sigma, variant=self.variant), perturbations


def in_parameter_space(site: Site) -> bool:
    """Whether traces at the site are those of its parameters' gradient: it trains the weight of one ``nn.Linear``."""
    layer = site.layers[0] if len(site.layers) == 1 else None
    return layer is not None and isinstance(layer.module, nn.Linear) and f"{layer.name}.weight" in site.parameters


def sq_norm(site: Site, x: Tensor | None, delta: Tensor) -> Tensor:
    """``(r,)`` squared norms: of the parameter gradient where ``x`` is given (an ``nn.Linear``), else of ``delta``."""
    if x is None:
        return delta.flatten(1).square().sum(1)
    return linear_gradient_sq_norm(x.to(delta.dtype), delta, bias=f"{site.layers[0].name}.bias" in site.parameters)


def _row_gradient(site: Site, perturbation: Perturbation, weights: Tensor) -> dict[str, Tensor]:
    layer, x, z = perturbation.layer, perturbation.x, perturbation.z
    if layer is None or x is None:
        raise TypeError("only layers are perturbed jointly.")
    delta = column(weights.to(z.dtype), z) * z
    return _trained(site, layer.name, layer_gradient(layer.module, x, delta))


def _trained(site: Site, layer: str, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    named = {f"{layer}.{leaf}": gradient for leaf, gradient in gradients.items()}
    return {name: gradient for name, gradient in named.items() if name in site.parameters}
