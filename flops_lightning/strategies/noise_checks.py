"""Kinds and widths of noise that do not go together, or with the sites they are to be used at."""

from __future__ import annotations

from collections.abc import Sequence

from flops_lightning.errors import SettingError
from flops_lightning.noise.kinds import NoiseSpec, tokens_and_features
from flops_lightning.strategies.pilots import PilotSpec
from flops_lightning.strategies.sites import Site


def check_noise(noise: NoiseSpec, pilots: PilotSpec, *, token_sigma: bool, learn_sigma: float) -> None:
    """Check the settings against each other.

    Raises:
        SettingError: orthogonal noise with what needs independent queries, or a sigma to be learned from noise that is
            not Gaussian.
    """
    if noise.orthogonal and token_sigma:
        raise SettingError(
            "strategy.token_sigma", True, "learns from products of independent queries, and orthogonal ones are not.",
            "Write noise: {orthogonal: false}, or token_sigma: false.",
        )  # fmt: skip
    if noise.orthogonal and pilots.queries:
        raise SettingError(
            "strategy.pilots.queries", pilots.queries, "orthogonal queries depend on the pilots before them, and so do "
            "counts made from pilots: the estimate would be biased.", "Write 0, or noise: {orthogonal: false}.",
        )  # fmt: skip
    if learn_sigma and noise != NoiseSpec():
        raise SettingError(
            "strategy.learn_sigma", learn_sigma, f"needs dense Gaussian noise, not {noise}.",
            "Write 0, or leave `noise` out.",
        )  # fmt: skip


def check_learnable(sites: Sequence[Site], unit: int, *, token_sigma: bool, learn_sigma: float) -> None:
    """Check that the widths of sites can be learned.

    Raises:
        SettingError: several layers are perturbed together, or there are no two independent queries to learn from.
    """
    together = [site.name for site in sites if site.together]
    for name, value in (("token_sigma", token_sigma), ("learn_sigma", learn_sigma)):
        if value and together:
            raise SettingError(
                f"strategy.{name}", value, f"cannot be learned at {together[0]!r}, where several layers are perturbed "
                "together.", "Write together: false, or leave it out.",
            )  # fmt: skip
    if token_sigma and all(site.queries_per_sample < 2 * unit for site in sites):
        raise SettingError(
            "strategy.token_sigma", True, "learns from pairs of independent queries, and there is one at each site.",
            f"Raise queries_per_sample to {2 * unit} or more.",
        )  # fmt: skip


def check_tokens(shapes: Sequence[tuple[int, ...]], noise: NoiseSpec, *, token_sigma: bool) -> None:
    """Check that what is about tokens meets some.

    Args:
        shapes: Shapes of a row of noise, at all sites.
        noise: Kind of noise.
        token_sigma: Whether the widths of tokens are to be learned.

    Raises:
        SettingError: no site has any.
    """
    sizes = [tokens_and_features(shape) for shape in shapes]
    if token_sigma and all(tokens == 1 for tokens, _ in sizes):
        raise SettingError("strategy.token_sigma", True, "no site has more than one token.", "Write false.")
    if noise.layout == "factored" and all(min(size) == 1 for size in sizes):
        raise SettingError(
            "strategy.noise.layout", "factored", "no site has more than one token and one feature.", "Write dense."
        )
