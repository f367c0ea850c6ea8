"""``LikelihoodRatio``: the estimator of FLOPS (Ren et al., ICLR 2025), eq. 1, as a strategy.

At a site with activation ``h_b``, noise ``z ~ N(0, I)`` and noise width ``sigma``, for sample ``b`` with ``A_b``
queries::

    delta_b = 1 / A_b  sum_q (L_b(h_b + sigma z_q) - c_bq) z_q / sigma        grad = 1 / B  sum_b J_b^T delta_b

The weights ``(L - c) / sigma`` and the sums over queries are in ``delta.py``, the loop over chunks in
``site_queries.py``, ``J^T delta`` in ``closed_form.py`` and ``local_vjp.py``. Noise of other kinds is in
``noise_kinds.py``; widths that are learned are in ``token_sigma.py`` and ``learned_sigma.py``.

Forward only through everything between a site and the loss. ``linear`` sites use no autograd at all; ``block`` and
``group`` sites use a local VJP inside the site, never through its suffix. The exact head (an option, ``exact_head.py``)
differentiates the loss function in the logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flops_lightning.distributed import gather_lines, mean_over_ranks
from flops_lightning.network.staging import StagedNetwork
from flops_lightning.noise.kinds import NoiseSpec, read_noise
from flops_lightning.queries import CleanPass, LossFunction
from flops_lightning.strategies.engine import SiteGradient
from flops_lightning.strategies.exact_head import check_exact_head, find_exact_head, output_gradient
from flops_lightning.strategies.learned_sigma import LearnedSigma
from flops_lightning.strategies.noise_checks import check_learnable, check_noise, check_tokens
from flops_lightning.strategies.perturbation import noise_shapes
from flops_lightning.strategies.query_strategy import QueryStrategy
from flops_lightning.strategies.seen_traces import SeenTraces
from flops_lightning.strategies.site_queries import QueriedOutput, SiteQueries
from flops_lightning.strategies.site_scales import site_scales
from flops_lightning.strategies.site_widths import SiteWidth
from flops_lightning.strategies.sites import Site
from flops_lightning.strategies.token_sigma import TokenSigma


class LikelihoodRatio(QueryStrategy[QueriedOutput]):
    """Likelihood-ratio gradient estimates from forward passes with noise at the output of sites.

    Traces are those of the parameter gradient at a single ``nn.Linear`` (FLOPS, theorem 1), those of the gradient with
    respect to the activation (a proxy) elsewhere, and not known where layers are perturbed together.
    """

    def __init__(
        self,
        *,
        noise: NoiseSpec | None = None,
        token_sigma: bool = False,
        learn_sigma: float = 0.0,
        exact_head: bool = False,
        **settings: Any,
    ) -> None:
        """Keep the settings; :meth:`bind` checks them against the network.

        Args:
            noise: Kind of noise; None: dense and Gaussian.
            token_sigma: Learn from each step's queries how wide the noise of later steps should be at each token of a
                site (or position of a feature map): ``sigma_t ~ ||delta_t||^(-1/2)``, mean square sigma^2. This lowers
                the variance where the tokens' gradients differ. Sites with one token are left alone. Batches need two
                samples or more.
            learn_sigma: Learning rate of log sigma, one for each site, stepped by Adam down the derivative of the
                *smoothed* loss; sigma stays within a factor of 10 of its setting. 0: sigma is fixed. Useful for
                piecewise constant losses (the 0-1 error) and flat regions, where no one knows which sigma reaches the
                next step. It does not minimise variance or bias: noise raises a convex loss, so there sigma tends to
                shrink to its bound.
            exact_head: The site that ends the network (noise at the logits) spends no queries: autograd of the loss
                alone gives its derivative in the logits (``p - y`` under cross-entropy), and the parameters' gradient
                follows as from an estimate. Needs a differentiable loss. The site's ``sigma`` and
                ``queries_per_sample`` are not used, and allocators do not see it.
            **settings: See :class:`QueryStrategy`.

        Raises:
            SettingError: an unknown choice, a value out of range, or settings that exclude each other.
        """
        super().__init__(**settings)
        self.noise = read_noise(noise)
        self.token_sigma, self.learn_sigma, self.exact_head = token_sigma, learn_sigma, exact_head
        check_noise(self.noise, self.pilots, token_sigma=token_sigma, learn_sigma=learn_sigma)
        self._tokens = TokenSigma() if token_sigma else None
        self._sigmas = LearnedSigma(learn_sigma) if learn_sigma else None
        self._widths: dict[str, SiteWidth] = {}
        self._head: Site | None = None

    def bind(self, network: StagedNetwork, loss: LossFunction) -> None:
        """Resolve sites, pilots and the exact head.

        Raises:
            SettingError: see :meth:`QueryStrategy.bind` and :func:`find_exact_head`; or widths that are to be learned
                where layers are perturbed together, or from single queries.
        """
        every = super().resolve_sites(network)
        one_update = self.update == "simultaneous"
        self._head = find_exact_head(network, every, self.pilots, one_update=one_update) if self.exact_head else None
        queried = self.resolve_sites(network)
        check_learnable(queried, self.unit, token_sigma=self.token_sigma, learn_sigma=self.learn_sigma)
        super().bind(network, loss)

    def resolve_sites(self, network: StagedNetwork) -> tuple[Site, ...]:
        """The sites of a network that spend queries."""
        head = None if self._head is None else self._head.name
        return tuple(site for site in super().resolve_sites(network) if site.name != head)

    @property
    def exact_sites(self) -> tuple[Site, ...]:
        """The exact head, if there is one."""
        return () if self._head is None else (self._head,)

    @property
    def widths(self) -> Mapping[str, SiteWidth]:
        """Present width of the noise at each site: what was set, and what was learned before this batch."""
        return {site.name: self.site_queries.width(site) for site in self.sites}

    @property
    def engine(self) -> SiteQueries:
        """What runs the queries of a site, with these settings."""
        return self.site_queries

    @property
    def site_queries(self) -> SiteQueries:
        """The same, by its own name."""
        return SiteQueries(
            self.network, self.loss, self.variant, self.chunk_rows, self.seed, self.rank, noise=self.noise,
            widths=self._widths, token_squares=self.token_sigma, slopes=bool(self.learn_sigma),
        )  # fmt: skip

    def clean_pass(self, inputs: Tensor, targets: Tensor) -> CleanPass:
        """Run the batch unperturbed; from here on the widths are those that earlier batches taught.

        Raises:
            SettingError: at the first batch: no site has the tokens that a setting is about, or the exact head is none.
        """
        first = self._costs is None
        self._take_widths()
        clean = super().clean_pass(inputs, targets)
        if first:
            if self.token_sigma or self.noise.layout == "factored":
                shapes = [s for site in self.sites for s in noise_shapes(self.network, self.loss, site, clean)]
                check_tokens(shapes, self.noise, token_sigma=self.token_sigma)
            if self._head is not None:
                check_exact_head(self.network, self.loss, self._head, clean)
        return clean

    def _take_widths(self) -> None:
        # What earlier batches taught, fixed for this one: noise whose width knew of its own queries would bias them.
        for site in self.sites if self._tokens or self._sigmas else ():
            sigma = self._sigmas.sigma(site) if self._sigmas else site.sigma
            self._widths[site.name] = SiteWidth(sigma, self._tokens.widths(site.name) if self._tokens else None)

    def learn(self, site: Site, queried: QueriedOutput) -> None:
        """Learn widths for the batches that follow."""
        if self._tokens is not None and queried.sums.token_squares is not None:
            squares = queried.sums.token_mean_squares(queried.unit)
            self._tokens.observe(site.name, torch.cat(gather_lines(self.communicator, squares)))
        if self._sigmas is not None:
            self._sigmas.step(site, mean_over_ranks(self.communicator, queried.sums.slope(), len(queried.survivors)))

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`QueryStrategy.state_dict`; and the widths that were learned."""
        learned = {"token_sigma": self._tokens, "learned_sigma": self._sigmas}
        return super().state_dict() | {name: part.state_dict() for name, part in learned.items() if part is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; widths that were not learned there start as they were set.

        Raises:
            SettingError: see :meth:`QueryStrategy.load_state_dict`.
        """
        super().load_state_dict(state)
        for name, part in (("token_sigma", self._tokens), ("learned_sigma", self._sigmas)):
            if part is not None:
                part.load_state_dict(state.get(name, {}))
        self._take_widths()

    def site_scales(self, clean: CleanPass, metric: Mapping[str, Tensor] | None) -> list[float]:
        """By one local VJP of a random direction at each site (Hutchinson's estimator)."""
        return site_scales(self.site_queries, self.sites, clean, metric).tolist()

    def exact_gradient(self, site: Site, clean: CleanPass) -> dict[str, Tensor]:
        """From the derivative of the loss in the network's output."""
        delta = output_gradient(self.loss, clean) / clean.batch_size
        return self.site_queries.gradient(site, clean, delta)

    def estimate_site(
        self,
        place: int,
        clean: CleanPass,
        counts: NDArray[np.int64],
        pilot_weight: Tensor | None,
        seen: SeenTraces | None,
    ) -> SiteGradient:
        """Layers that are perturbed together have no sums by sample, pilots and traces."""
        if self.sites[place].together:
            return self.site_queries.joint(self.sites[place], clean, counts)
        return super().estimate_site(place, clean, counts, pilot_weight, seen)

    def spend(self, site: Site, clean: CleanPass, counts: NDArray[np.int64]) -> None:
        """Run queries of a site, to time them."""
        if site.together:
            self.site_queries.joint(site, clean, counts)
        else:
            super().spend(site, clean, counts)
