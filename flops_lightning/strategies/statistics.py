"""Statistics of samples and sites that a strategy gives to an allocator, in addition to losses and pilots.

Trace predictors come from the clean pass and tell how noisy each sample's gradient will be, without a query. The trace
of a query's gradient is about ``d ||dL/dh||^2`` at a site with ``d`` active features, and the derivative at a deep site
is the one at the loss pulled back through the layers between. So the squared norm of the derivative at the top of the
network predicts the noise at every site below well. It is taken through the trailing stages alone, never
through the blocks.

Scales make the traces of sites comparable. Traces at block and group sites are taken in activation space. A query's
parameter gradient is ``J_b^T delta``, so its squared norm is on average that of ``delta`` times ``||J_b||_F^2 / d``.
For independent ``z_b ~ N(0, I)`` the one vector ``g = sum_b J_b^T z_b`` has ``E ||g||^2 = sum_b ||J_b||_F^2``
(Hutchinson's estimator), which costs one local VJP.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flops_lightning.errors import SettingError
from flops_lightning.network.rows import value_of, with_value
from flops_lightning.network.staging import StagedNetwork
from flops_lightning.noise.keys import NoiseKey, normal_rows
from flops_lightning.queries import CleanPass, LossFunction, at_least_float32, full_precision, row_losses
from flops_lightning.strategies.perturbation import clean_layer_input
from flops_lightning.strategies.precision import differentiable
from flops_lightning.strategies.site_queries import SiteQueries, in_parameter_space, sq_norm
from flops_lightning.strategies.sites import Site
from flops_lightning.suffix_loss import SuffixLoss, refuse_derivative

PREDICTORS = ("activation", "head_gradient", "output_gradient", "top_gradient")
SCALE_EVERY = 20
"""Batches after which a scale is estimated anew."""
Metric = Mapping[str, Tensor]
"""Weights of the squared derivatives, by parameter name."""


class OptionalStatistics:
    """What is requested of the optional fields of :class:`SampleStatistics`, and what need not be computed again.

    Attributes:
        predictors: Names of the trace predictors that are read.
        scales: By name of the statistic the draw at which the scales were estimated, and the scales.
        measured_costs: Of each site; empty before they are measured.
    """

    def __init__(self) -> None:
        self.predictors: frozenset[str] = frozenset()
        self.scales: dict[str, tuple[int, list[float]]] = {}
        self.measured_costs: list[float] = []

    def request(self, names: Collection[str], loss: LossFunction) -> None:
        """Note which predictors are read, so that clean passes keep their activations.

        Raises:
            SettingError: a predictor would differentiate a loss that is the rest of the network.
        """
        offered = {"activation"} if isinstance(loss, SuffixLoss) else set(PREDICTORS)
        wanted = {name.split(".")[1] for name in names if name.startswith("predictors.")} & set(PREDICTORS)
        for name in sorted(wanted - offered):
            refuse_derivative(loss, "traces.predictors", name, "Write predictors: [loss], or [loss, activation].")
        self.predictors = frozenset(wanted | (offered if "predictors" in names else set()))

    def kept(self, network: StagedNetwork) -> set[int]:
        """Indices of the activations that the predictors read."""
        starts = {"head_gradient": len(network) - 1, "top_gradient": network.head}
        return {start for name, start in starts.items() if name in self.predictors}

    def state_dict(self) -> dict[str, Any]:
        """Names of the predictors, scales and measured costs."""
        scales = {name: list(known) for name, known in self.scales.items()}
        return {"predictors": sorted(self.predictors), "scales": scales, "seconds": self.measured_costs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; older states lack some of it."""
        self.scales = {name: (draw, scale) for name, (draw, scale) in state.get("scales", {}).items()}
        self.measured_costs = list(state.get("seconds", []))
        self.predictors = frozenset(state.get("predictors", []))


def trace_predictors(
    network: StagedNetwork, loss: LossFunction, sites: Sequence[Site], clean: CleanPass, names: Collection[str]
) -> dict[str, Tensor]:
    """Those of :data:`PREDICTORS` that are in ``names``.

    Returns:
        ``output_gradient`` ``(b,)``: squared norm of the loss's derivative in the network's output (``p - y`` under
        cross-entropy). ``head_gradient`` ``(b,)``: the same in the input of the last stage. ``top_gradient`` ``(b,)``:
        the same in the input of the final norm and pooling. ``activation.<stage>`` ``(b,)``: mean square of the clean
        activation that enters a stage at which a site begins or ends, at the tokens that the head reads; and
        ``activation.<stage>.all`` ``(b,)`` over all tokens, where these are not all. With normalisation layers the
        derivative falls as the activation grows.
    """
    last, found = len(network) - 1, dict[str, Tensor]()
    starts = {"output_gradient": last + 1, "head_gradient": last, "top_gradient": network.head}
    for name, start in starts.items():
        if name in names and start > 0:  # through the whole network it would be backpropagation by another name
            found[name] = _gradient_sq_norm(network, loss, clean, start)
    if "activation" in names:
        tokens = network.stages[network.head].reads
        for i in sorted({site.start for site in sites} - {0, len(network)}):
            h, name = value_of(clean.activations[i]), f"activation.{network.stages[i].name}"
            if not h.is_floating_point():  # names of images
                continue
            found[name] = _mean_square(h, tokens)
            if tokens is not None and h.dim() > 2:
                found[f"{name}.all"] = _mean_square(h, None)
    return found


def _gradient_sq_norm(network: StagedNetwork, loss: LossFunction, clean: CleanPass, start: int) -> Tensor:
    below = clean.activations[start].detach()
    # Copies of the weights that autocast made without a graph would cut the gradient off.
    torch.clear_autocast_cache()
    with network.evaluating(), network.frozen_parameters(), torch.enable_grad(), differentiable(below) as entering:
        h = value_of(entering).clone().requires_grad_(True)
        try:
            # Run on a clone: a stage may work in place, and a leaf must not change.
            losses = row_losses(loss, network.run(with_value(entering, h.clone()), start), clean.targets)
            with full_precision(h):
                (gradient,) = torch.autograd.grad(losses.sum(), h)
        except RuntimeError as error:  # the loss or the head is a black box
            raise SettingError(
                "traces.predictors", "*_gradient", f"needs a differentiable loss and head: {error}.",
                "Write predictors: [loss, activation].",
            ) from error  # fmt: skip
    return at_least_float32(gradient).flatten(1).square().sum(1)


def _mean_square(h: Tensor, tokens: slice | None) -> Tensor:
    h = h if tokens is None or h.dim() < 3 else h[:, tokens]  # a pooled feature has no tokens
    return at_least_float32(h).flatten(1).square().mean(1)


@torch.no_grad()
def site_scales(queries: SiteQueries, sites: Sequence[Site], clean: CleanPass, metric: Metric | None = None) -> Tensor:
    """``(s,)`` factors that convert each site's traces to squared units of its parameters.

    ``metric`` are weights of the squared derivatives (1 / v under Adam); None: 1.
    """
    scales = []
    for site in sites:
        if site.together:
            raise SettingError(
                "model.strategy.sites", site.name, "perturbs several layers in one query, so its traces are unknown.",
                "Write together: false, or use another allocator than CostAwareAllocator.",
            )  # fmt: skip
        x = clean_layer_input(queries.network, site, clean, rows=queries.chunk_rows) if site.layers else None
        # Weighted as queries are: by the tokens' relative widths, where they differ.
        z = queries.width(site).scaled(_probe(queries, site, clean, x))[1]
        gradient = queries.gradient(site, clean, z, x)
        weighted = [g.square() * metric[name] if metric else g.square() for name, g in gradient.items()]
        norm = sq_norm(site, x if in_parameter_space(site) else None, z).sum()
        scales.append(torch.stack([w.sum() for w in weighted]).sum() / norm)
    return torch.stack(scales)


def _probe(queries: SiteQueries, site: Site, clean: CleanPass, layer_input: Tensor | None) -> Tensor:
    if layer_input is not None:
        like = site.layers[0].module(layer_input)
    else:
        like = value_of(clean.activations[site.last + 1])
        like = like if site.tokens is None else like[:, site.tokens]
    key = NoiseKey(queries.seed, clean.draw, f"{site.name}/scale", queries.rank, queries.generator)
    samples = np.arange(clean.batch_size)
    shape = tuple(like.shape[1:])
    return normal_rows(key, samples, np.zeros_like(samples), shape, device=like.device, dtype=like.dtype)
