"""``LikelihoodRatio``: the estimator of FLOPS (Ren et al., ICLR 2025), eq. 1, as a strategy.

At a site with activation ``h_b``, noise ``z ~ N(0, I)`` and noise width ``sigma``, for sample ``b`` with ``A_b``
queries::

    delta_b = 1 / A_b  sum_q (L_b(h_b + sigma z_q) - c_bq) z_q / sigma        grad = 1 / B  sum_b J_b^T delta_b

The weights ``(L - c) / sigma`` and the sums over queries are in ``delta.py``, the loop over chunks in
``site_queries.py``, ``J^T delta`` in ``vjp.py``, other kinds of noise in ``noise/kinds.py``, learned widths in
``widths.py``.

Everything between a site and the loss runs forward only. ``linear`` sites use no autograd at all; ``block`` and
``group`` sites use a local VJP inside the site, never through its suffix. The exact head (an option, ``exact_head.py``)
differentiates the loss function in the logits.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flops_lightning.distributed import gather_lines, mean_over_ranks
from flops_lightning.errors import SettingError
from flops_lightning.network.staging import StagedNetwork
from flops_lightning.noise.kinds import NoiseSpec, tokens_and_features
from flops_lightning.queries import CleanPass, LossFunction
from flops_lightning.settings import read_settings
from flops_lightning.strategies.engine import SiteGradient
from flops_lightning.strategies.exact_head import check_exact_head, find_exact_head, output_gradient
from flops_lightning.strategies.perturbation import noise_shapes
from flops_lightning.strategies.query_strategy import QueryStrategy
from flops_lightning.strategies.site_queries import OutputQueryResult, SiteQueries
from flops_lightning.strategies.sites import Site
from flops_lightning.strategies.statistics import site_scales
from flops_lightning.strategies.widths import LearnedSigma, SiteWidth, TokenSigma
from flops_lightning.suffix_loss import SuffixLoss, refuse_derivative


class LikelihoodRatio(QueryStrategy[OutputQueryResult]):
    """Likelihood-ratio gradient estimates from forward passes with noise at the output of sites.

    Traces are those of the parameter gradient at a single ``nn.Linear`` (FLOPS, theorem 1), those of the gradient with
    respect to the activation (a proxy) at other sites, and unknown if layers are perturbed together.

    Example:
        >>> from flops_lightning import LikelihoodRatio, SiteSpec, stage_network
        >>> _ = torch.manual_seed(0)
        >>> network = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        >>> sites = [SiteSpec(stages=stages, queries_per_sample=800) for stages in (["0", "1"], ["2"])]
        >>> strategy = LikelihoodRatio(sites=sites, seed=0)
        >>> strategy.bind(stage_network(network), lambda output, target: (output - target).square().sum(1))
        >>> inputs, targets = torch.tensor([[1.0, 2.0], [3.0, -1.0]]), torch.ones(2, 1)
        >>> strategy.estimate(strategy.clean_pass(inputs, targets)).queries
        3200
        >>> exact = torch.autograd.grad((network(inputs) - targets).square().mean(), network[0].weight)[0]
        >>> bool(torch.cosine_similarity(network[0].weight.grad.flatten(), exact.flatten(), dim=0) > 0.98)
        True
    """

    def __init__(
        self, *, noise: NoiseSpec | None = None, token_sigma: bool = False, learn_sigma: float = 0.0,
        exact_head: bool = False, **settings: Any,
    ) -> None:  # fmt: skip
        """Keep the settings; :meth:`bind` checks them against the network.

        Args:
            noise: Kind of noise; None: dense and Gaussian.
            token_sigma: Learn from each step's queries the noise width of later steps for each token of a site (or
                position of a feature map): ``sigma_t ~ ||delta_t||^(-1/2)``, mean square sigma^2. This lowers the
                variance if the tokens' gradients differ. Sites with one token are unaffected. Batches need at least two
                samples.
            learn_sigma: Learning rate of log sigma, one for each site, updated by Adam along the derivative of the
                *smoothed* loss; sigma stays within a factor of 10 of its setting. 0: sigma is fixed. Useful for
                piecewise constant losses (the 0-1 error) and flat regions, where it is not known which sigma reaches
                the next step of the loss. It does not minimise variance or bias: noise raises a convex loss, so there
                sigma tends to shrink to its bound.
            exact_head: The site that ends the network (noise at the logits) spends no queries. Autograd of the loss
                alone gives the derivative with respect to the logits (``p - y`` for cross-entropy), and the parameters'
                gradient follows as from an estimate. Needs a differentiable loss. The site's ``sigma`` and
                ``queries_per_sample`` are not used, and allocators do not see it.
            **settings: See :class:`QueryStrategy`.
        """
        super().__init__(**settings)
        self.noise = read_settings(NoiseSpec, noise, "model.strategy.noise")
        self.token_sigma, self.learn_sigma, self.exact_head = token_sigma, learn_sigma, exact_head
        self._check_settings()
        self._learn_anew()

    def _learn_anew(self) -> None:
        self._tokens = TokenSigma() if self.token_sigma else None
        self._sigmas = LearnedSigma(self.learn_sigma) if self.learn_sigma else None
        self._widths: dict[str, SiteWidth] = {}

    def _check_settings(self) -> None:
        if self.noise.orthogonal and self.token_sigma:
            raise SettingError(
                "model.strategy.token_sigma", True,
                "learns from products of independent queries, and orthogonal ones are dependent.",
                "Write noise: {orthogonal: false}, or token_sigma: false.",
            )  # fmt: skip
        if self.noise.orthogonal and self.pilots.queries:
            raise SettingError(
                "model.strategy.pilots.queries", self.pilots.queries,
                "orthogonal queries depend on the pilots before them, "
                "and so do counts made from pilots: the estimate would be biased.",
                "Write 0, or noise: {orthogonal: false}.",
            )  # fmt: skip
        if self.learn_sigma and self.noise != NoiseSpec():
            raise SettingError(
                "model.strategy.learn_sigma", self.learn_sigma, f"needs dense Gaussian noise, not {self.noise}.",
                "Write 0, or leave `noise` out.",
            )  # fmt: skip

    def bind(self, network: StagedNetwork, loss: LossFunction) -> None:
        """Resolve sites, pilots and the exact head."""
        one_update = self.update == "simultaneous"
        self.exact_sites = ()
        if self.exact_head:
            refuse_derivative(loss, "model.strategy.exact_head", True, "Write exact_head: false.")
            head = find_exact_head(network, self.resolve_sites(network), self.pilots, one_update=one_update)
            self.exact_sites = (head,)
        self._check_learnable(self.resolve_sites(network))
        super().bind(network, loss)

    def _check_learnable(self, sites: Sequence[Site]) -> None:
        together = [site.name for site in sites if site.together]
        for name, value in (("token_sigma", self.token_sigma), ("learn_sigma", self.learn_sigma)):
            if value and together:
                raise SettingError(
                    f"model.strategy.{name}", value, f"cannot be learned at {together[0]!r}, where several layers are "
                    "perturbed together.", "Write together: false, or leave it out.",
                )  # fmt: skip
        single = [isinstance(n := site.queries_per_sample, int) and n < 2 * self.unit for site in sites]
        if self.token_sigma and all(single):
            raise SettingError(
                "model.strategy.token_sigma", True,
                "learns from pairs of independent queries, and each site has only one.",
                f"Raise queries_per_sample to {2 * self.unit} or more.",
            )  # fmt: skip

    def resolve_sites(self, network: StagedNetwork) -> tuple[Site, ...]:
        """The sites of a network that spend queries."""
        exact = [site.name for site in self.exact_sites]
        return tuple(site for site in super().resolve_sites(network) if site.name not in exact)

    def set_sigmas(self, sigmas: Mapping[str, float]) -> None:
        """See :meth:`ForwardGradientStrategy.set_sigmas`."""
        super().set_sigmas(sigmas)
        self._learn_anew()

    @property
    def widths(self) -> Mapping[str, SiteWidth]:
        """Present width of the noise at each site: as set, or as learned before this batch."""
        return {site.name: self.engine.width(site) for site in self.sites}

    @property
    def engine(self) -> SiteQueries:
        """Runs the queries of a site, with these settings."""
        return SiteQueries(
            self.network, self.loss, self.variant, self.chunk_rows, self.seed, self.rank, noise=self.noise,
            widths=self._widths, token_squares=self.token_sigma, slopes=bool(self.learn_sigma),
            generator=self.generator,
        )  # fmt: skip

    def clean_pass(self, inputs: Any, targets: Any) -> CleanPass:
        """Run the batch unperturbed, and from now on use the widths that earlier batches learned."""
        first = self._costs is None
        self._update_widths()
        clean = super().clean_pass(inputs, targets)
        if first:
            if self.token_sigma or self.noise.layout == "factored":
                self._check_tokens(clean)
            for head in self.exact_sites:
                check_exact_head(self.network, self.loss, head, clean)
            if isinstance(self.loss, SuffixLoss):
                for site in (site for site in self.sites if site.last == len(self.network) - 1):
                    self.loss.check_sigma(clean.output, clean.targets, site.sigma)
        return clean

    def _check_tokens(self, clean: CleanPass) -> None:
        shapes = [shape for site in self.sites for shape in noise_shapes(self.network, self.loss, site, clean)]
        sizes = [tokens_and_features(shape) for shape in shapes]
        if self.token_sigma and all(tokens == 1 for tokens, _ in sizes):
            raise SettingError("model.strategy.token_sigma", True, "no site has more than one token.", "Write false.")
        if self.noise.layout == "factored" and all(min(size) == 1 for size in sizes):
            problem = "no site has more than one token and one feature."
            raise SettingError("model.strategy.noise.layout", "factored", problem, "Write dense.")

    def _update_widths(self) -> None:
        # Fixed while a batch's queries run: noise whose width depended on its own queries would bias them.
        for site in self.sites if self._tokens or self._sigmas else ():
            sigma = self._sigmas.sigma(site) if self._sigmas else site.sigma
            self._widths[site.name] = SiteWidth(sigma, self._tokens.widths(site.name) if self._tokens else None)

    def learn(self, site: Site, result: OutputQueryResult) -> None:
        """Learn widths for later batches."""
        if self._tokens is not None and result.sums.token_squares is not None:
            squares = result.sums.token_mean_squares(result.unit)
            self._tokens.observe(site.name, torch.cat(gather_lines(self.communicator, squares)))
        if self._sigmas is not None:
            self._sigmas.step(site, mean_over_ranks(self.communicator, result.sums.slope(), len(result.survivors)))

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`SiteStrategy.state_dict`; and the learned widths."""
        learned = {"token_sigma": self._tokens, "learned_sigma": self._sigmas}
        return super().state_dict() | {name: part.state_dict() for name, part in learned.items() if part is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; widths that are not in it start as set."""
        super().load_state_dict(state)
        for name, part in (("token_sigma", self._tokens), ("learned_sigma", self._sigmas)):
            if part is not None:
                part.load_state_dict(state.get(name, {}))
        self._update_widths()

    def site_scales(self, clean: CleanPass, metric: Mapping[str, Tensor] | None) -> list[float]:
        """By one local VJP of a random direction at each site (Hutchinson's estimator)."""
        return site_scales(self.engine, self.sites, clean, metric).tolist()

    def exact_gradient(self, site: Site, clean: CleanPass) -> dict[str, Tensor]:
        """From the derivative of the loss in the network's output."""
        return self.engine.gradient(site, clean, output_gradient(self.loss, clean) / clean.batch_size)

    def joint_gradient(self, site: Site, clean: CleanPass, counts: NDArray[np.int64]) -> SiteGradient:
        """Each row brings its own inputs of the layers, which move with the noise below them."""
        return self.engine.joint(site, clean, counts)
