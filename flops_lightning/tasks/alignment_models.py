"""The language model behind an adapter, and which models a checkpoint's adapter belongs to."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from flops_lightning.errors import SettingError
from flops_lightning.language import CaptionLoss, CaptionScorer, RemoteCaptionLoss, load_language_model
from flops_lightning.language.models import load_tokenizer
from flops_lightning.strategies.base import ForwardGradientStrategy
from flops_lightning.strategies.site_specs import SiteSpec
from flops_lightning.tasks.language_model import fingerprint
from flops_lightning.tasks.vision_encoder import VisionEncoder

KEY = "adapter_alignment"
"""Where a checkpoint says what its adapter belongs to."""


def load_scorer(
    llm: str | CaptionScorer, kwargs: Mapping[str, Any], *, visual_tokens: int, bos: bool, eos: bool
) -> tuple[CaptionScorer, Any]:
    """What scores captions, and its tokenizer; of a scorer that which ``kwargs["tokenizer"]`` names, or None.

    Raises:
        SettingError: the model cannot be loaded or has no such tokens, or a setting has no effect on a scorer.
    """
    if isinstance(llm, CaptionScorer):
        named = kwargs.get("tokenizer")
        other = {name: value for name, value in kwargs.items() if name != "tokenizer"}
        for name, value in {"llm_kwargs": other, "bos": bos, "eos": eos}.items():
            if value:
                raise SettingError(name, value, "has no effect: llm is given as a scorer.", "Set it in the scorer.")
        if llm.visual_tokens != visual_tokens:
            problem = f"the scorer takes {llm.visual_tokens} vectors."
            raise SettingError("visual_tokens", visual_tokens, problem, f"Write {llm.visual_tokens}.")
        return llm, None if named is None else load_tokenizer(str(named), setting="llm_kwargs.tokenizer")
    model, tokenizer = load_language_model(llm, **kwargs)

    def end(name: str, *, wanted: bool) -> int | None:
        token = getattr(tokenizer, f"{name}_token_id") if wanted else None
        if wanted and token is None:
            raise SettingError(name, True, "the tokenizer has no such token.", f"Write {name}: false.")
        return token

    ends = {"bos": end("bos", wanted=bos), "eos": end("eos", wanted=eos)}
    return CaptionLoss(model, visual_tokens=visual_tokens, bos=ends["bos"], eos=ends["eos"]), tokenizer


def check_features(
    encoder: VisionEncoder | None, encoder_kwargs: Mapping[str, Any] | None, feature_width: int, visual_tokens: int
) -> int:
    """The number of vectors: a :class:`SettingError` where encoder and settings do not fit each other."""
    if encoder is None and encoder_kwargs:
        raise SettingError("encoder_kwargs", encoder_kwargs, "has no effect without an encoder.", "Leave it out.")
    if (encoder is None) is not bool(feature_width):
        problem = "is known from the encoder." if encoder else "is needed without an encoder."
        raise SettingError("feature_width", feature_width, problem, "Leave it out." if encoder else "Write it.")
    if encoder is None or encoder.places == 1:
        return visual_tokens
    if visual_tokens not in (1, encoder.places):
        problem = f"each of the {encoder.places} patches becomes one vector."
        raise SettingError("visual_tokens", visual_tokens, problem, "Leave it out.")
    return encoder.places


def described(loss: CaptionScorer, name: str) -> dict[str, str]:
    """By what a checkpoint knows the language model: its name, and a hash of the config of one that is here."""
    if isinstance(loss, RemoteCaptionLoss):
        return {"llm": f"service {loss.info.model}", "llm_config": ""}
    model = getattr(loss, "llm", None)
    return {"llm": Path(name).name, "llm_config": "" if model is None else fingerprint(model, {})}


def mean_embedding(loss: CaptionScorer) -> Tensor | None:
    """``(d,)`` the mean of all tokens' embeddings; None where the language model runs elsewhere."""
    llm = getattr(loss, "llm", None)
    if llm is None:
        return None
    table = llm.get_input_embeddings()
    weight = table.weight.detach()
    plain = type(table).forward is nn.Embedding.forward  # Gemma's, for one, scales the rows of its weight
    every = weight if plain else table(torch.arange(len(weight), device=weight.device)).detach()
    return every.float().mean(0)


def take_site(strategy: ForwardGradientStrategy | None, relative_sigma: float) -> None:
    """Give a strategy that names no sites the adapter's outputs; refuse two widths of the noise."""
    specs: Any = getattr(strategy, "specs", None)
    if specs is not None and not specs:
        cast("Any", strategy).specs = (SiteSpec(stages=["adapter"], name="adapter"),)
    if relative_sigma and strategy is not None:
        own = [spec.sigma for spec in specs or () if spec.sigma != SiteSpec.sigma]
        if specs is None or own:
            problem = f"has no effect: {'the sites have a sigma' if own else 'the strategy has no sites'}."
            raise SettingError("relative_sigma", relative_sigma, problem, "Leave out one of the two.")


def check_same_models(saved: Mapping[str, Any] | None, own: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a checkpoint says; a :class:`SettingError` if its adapter belongs to another model or another input."""
    if saved is None:
        problem = "does not hold an adapter of an AdapterAlignment."
        raise SettingError("ckpt_path", KEY, problem, "Give a checkpoint of such a run.")
    for name, value in own.items():
        unknown = name == "encoder" and not value  # features that come from elsewhere
        if saved[name] != value and not unknown:
            problem = f"the checkpoint's adapter was learned with {saved[name]!r}."
            remedy = "Give the settings of that run, or start a new run without the checkpoint."
            raise SettingError(name, value, problem, remedy)
    return saved
