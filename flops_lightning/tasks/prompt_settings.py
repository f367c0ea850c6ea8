"""Settings of the prompts of a task, and the sites that follow from them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, cast, get_args

import torch

from flops_lightning.errors import SettingError, check_choice, check_positive, check_whole
from flops_lightning.prompts.intrinsic import Coordinates, IntrinsicPrompt, PromptSpec
from flops_lightning.prompts.stages import IMAGE_SEED
from flops_lightning.strategies.base import ForwardGradientStrategy
from flops_lightning.strategies.crossed import CENTRED
from flops_lightning.strategies.site_specs import SiteSpec

Pairing = Literal["split", "crossed", "joint"]
STAGES = {"text_prompt": "scores", "image_prompt": "image_prompt"}
"""The stage of a prompted CLIP that owns each prompt."""


@dataclass(frozen=True)
class TextPrompt:
    """Setting: a prompt, where it starts, and how its numbers are perturbed; see :class:`PromptSpec`.

    Attributes:
        tokens: Number of prompt tokens; 0 (with ``dim: 0``): no prompt.
        dim: Number of trained numbers: of the whole prompt (``flat``), or of each token (``by_token``).
        coordinates: ``flat``: one vector ``z`` for all tokens. ``by_token``: one for each token.
        init: ``data``: the prompt starts at the words of the template, or at the mean patch of training images.
            ``zeros``.
        seed: Seed of the frozen random matrix ``W``.
        sigma: Standard deviation of the noise on ``z``, whose coordinates travel a distance of about 1. It and
            ``queries`` apply to strategies that name no sites; backprop and searches do not use them.
        queries: Queries per step: text draws, which all images share, or draws per image.

    Example:
        >>> TextPrompt(tokens=4, dim=100).spec.dim
        100
    """

    tokens: int = 12
    dim: int = 500
    coordinates: Coordinates = "flat"
    init: Literal["data", "zeros"] = "data"
    seed: int = 0
    sigma: float = 0.02
    queries: int = 10

    @property
    def on(self) -> bool:
        """Whether there is a prompt."""
        return self.tokens > 0

    @property
    def spec(self) -> PromptSpec:
        """Size, start and seed alone."""
        return PromptSpec(self.tokens, self.dim, self.coordinates, self.init, self.seed)

    def check_for(self, name: str, width: int) -> None:
        """Raise a :class:`SettingError` for values that cannot work with tokens of this width."""
        whole = "Write, for example, {}, or 0 of tokens and dim for no prompt."
        check_whole(f"{name}.tokens", self.tokens, 0, whole.format(12))
        check_whole(f"{name}.dim", self.dim, 0, whole.format(500))
        if not self.on and self.dim:
            problem = f"has no effect: {name}.tokens is 0."
            raise SettingError(f"{name}.dim", self.dim, problem, f"Write dim: 0, or {name}: null, for no prompt.")
        check_positive(f"{name}.sigma", self.sigma, "Write, for example, 0.02.")
        check_whole(f"{name}.queries", self.queries, 1, "Write, for example, 10.")
        if not self.on:
            return
        try:
            _ = self.spec
        except SettingError as error:
            where = error.setting.replace("prompt", name, 1)
            raise SettingError(where, error.value, error.problem, error.remedy) from error
        whole_prompt = self.coordinates == "flat"
        most = self.tokens * width if whole_prompt else width
        if self.dim > most:
            of = f"{self.tokens} tokens of width {width}" if whole_prompt else f"a token of width {width}"
            problem = f"is more than the {most} numbers of {of}."
            raise SettingError(f"{name}.dim", self.dim, problem, f"Write {most} or less.")


@dataclass(frozen=True)
class ImagePrompt(TextPrompt):
    """Setting: an image prompt; as :class:`TextPrompt`, with 10 tokens by default.

    Example:
        >>> ImagePrompt().tokens
        10
    """

    tokens: int = 10

    def unstarted(self, width: int) -> IntrinsicPrompt:
        """The prompt before it has seen images, from which its start and the width of ``W`` come."""
        return IntrinsicPrompt(torch.zeros(self.tokens, width), self.spec, std=1.0, seed_offset=IMAGE_SEED)


def take_sites(
    strategy: ForwardGradientStrategy, prompts: dict[str, TextPrompt], pairing: Pairing | None,
    stages: Sequence[str] = tuple(STAGES.values()),
) -> None:  # fmt: skip
    """Give a strategy that names no sites those of the prompts that are on.

    ``split`` (the default): one site for each prompt, moved against the other's clean features. ``crossed``: the same
    sites, every query of one beside every query of the other (:mod:`flops_lightning.strategies.crossed`). ``joint``:
    one site, at which a query moves both. ``stages`` are those of the network; ``scores`` owns both prompts where there
    is no ``image_prompt``.

    Raises:
        SettingError: the pairing, or a prompt's ``sigma`` or ``queries``, has no effect here.
    """
    if pairing is not None:
        check_choice("pairing", pairing, get_args(Pairing))
        if not hasattr(strategy, "specs"):
            problem = f"has no effect: {type(strategy).__name__} has no sites."
            raise SettingError("pairing", pairing, problem, "Leave it out.")
        if strategy.specs:
            raise SettingError("pairing", pairing, "has no effect: the strategy names its sites.", "Leave out one.")
        if len(prompts) < 2:
            raise SettingError("pairing", pairing, "has no effect: there is one prompt.", "Leave it out.")
        _take_pairing(strategy, pairing)
    if not hasattr(strategy, "specs"):
        return
    if strategy.specs:
        for name, prompt in prompts.items():
            for field in ("sigma", "queries"):
                if getattr(prompt, field) != getattr(TextPrompt, field):
                    problem = "has no effect: the strategy names its sites."
                    remedy = "Set it in the site (sigma, queries_per_sample), or leave the sites out."
                    raise SettingError(f"{name}.{field}", getattr(prompt, field), problem, remedy)
        return
    owner = {name: stage if stage in stages else "scores" for name, stage in STAGES.items()}
    sites = [
        SiteSpec(stages=[owner[name]], sigma=prompt.sigma, queries_per_sample=prompt.queries)
        for name, prompt in prompts.items()
    ]
    if pairing == "joint":
        image, text = prompts["image_prompt"], prompts["text_prompt"]
        for field in ("sigma", "queries"):
            if getattr(text, field) != getattr(image, field):
                problem = (
                    f"differs from image_prompt.{field} = {getattr(image, field)}, but a joint query perturbs both."
                )
                raise SettingError(f"text_prompt.{field}", getattr(text, field), problem, "Make the two agree.")
        sites = [replace(sites[0], stages=["image_prompt", "scores"] if "image_prompt" in stages else ["scores"])]
    strategy.specs = tuple(sites)


def _take_pairing(strategy: ForwardGradientStrategy, pairing: Pairing) -> None:
    """Have a strategy cross its queries; refused where it cannot, or says something else itself."""
    own, variant = getattr(strategy, "pairing", None), getattr(strategy, "variant", "")
    if pairing != "crossed":
        if own == "crossed":
            problem = "is not what the strategy says, pairing: crossed."
            raise SettingError("pairing", pairing, problem, "Leave out one of the two.")
        return
    usable = "Use EvolutionStrategies with variant: leave_one_out, or SPSA, or write pairing: split."
    if "pairing" not in strategy.settings:
        problem = f"averages losses over the other prompt's queries, which {type(strategy).__name__} does not support."
        raise SettingError("pairing", pairing, problem, usable)
    if variant not in CENTRED:
        problem = f"compares queries with each other, which variant: {variant} does not."
        raise SettingError("pairing", pairing, problem, usable)
    cast("Any", strategy).pairing = pairing


def described(prompt: TextPrompt | None) -> dict[str, object]:
    """What of a prompt's settings belongs to what it has learned: all but how it is moved."""
    return {} if prompt is None else {k: v for k, v in asdict(prompt).items() if k not in ("sigma", "queries")}
