"""CLIP models of open_clip by name, with their tokenizer, and whether images fit them."""

import difflib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flops_lightning.datamodules.augmentation import CLIP
from flops_lightning.errors import SettingError, import_extra
from flops_lightning.prompts.class_texts import Tokenizer

FOLDER = "local-dir:"
"""With it, a model name is a folder that holds ``open_clip_config.json`` and weights."""
CONFIG = "open_clip_config.json"
TOLERANCE = 1e-3
"""Between means, and standard deviations, that count as the same."""


@dataclass(frozen=True, eq=False)
class FewTokens:
    """A tokenizer for a CLIP that kept a part of the vocabulary.

    Attributes:
        tokenizer: Gives the ids of the whole vocabulary.
        kept: ``(v,)`` those that are left, ascending; a token's place here is its new id.
    """

    tokenizer: Tokenizer
    kept: Tensor

    def __call__(self, texts: Sequence[str], context_length: int | None = None) -> Tensor:
        """``(c, context_length)`` new ids.

        Raises:
            SettingError: a text has a token that is not left.
        """
        given = [texts] if isinstance(texts, str) else texts
        ids = self.tokenizer(given, context_length=context_length)
        place = torch.searchsorted(self.kept, ids).clamp(max=len(self.kept) - 1)
        unknown = (self.kept[place] != ids).any(1)
        if bool(unknown.any()):
            text = given[int(unknown.int().argmax())]
            problem = "has words outside the part of CLIP's vocabulary that this model kept."
            raise SettingError("class_names", text, problem, "Use its words, or a model with all of them.")
        return place


def load_clip(model_name: str, checkpoint: str) -> tuple[nn.Module, Tokenizer]:
    """A CLIP in eval mode and its tokenizer.

    Args:
        model_name: A name of ``open_clip.list_models()``, or ``local-dir:`` with a folder in open_clip's form. A list
            ``tokens`` in the folder's ``open_clip_config.json`` holds the tokens of a part of the vocabulary.
        checkpoint: A tag of open_clip's weights (``openai``), or a file; empty: the folder's weights, or random ones.

    Raises:
        SettingError: an unknown name, weights that are not there or were trained with another activation.
    """
    open_clip = import_extra("open_clip", extra="clip", setting="model_name", value=model_name)
    if model_name.startswith(FOLDER):
        tokens = _folder_tokens(Path(model_name.removeprefix(FOLDER)), model_name, checkpoint)
    else:
        tokens = None
        _check_name(open_clip, model_name, checkpoint)
    try:
        clip: nn.Module = open_clip.create_model(model_name, pretrained=checkpoint or None)
        tokenizer: Tokenizer = open_clip.get_tokenizer(model_name)
    except Exception as error:
        problem = f"cannot be loaded ({type(error).__name__}: {str(error).splitlines()[0][:160]})."
        remedy = "Check the connection, or download the file and give its path; random weights: leave it empty."
        raise SettingError("checkpoint", checkpoint, problem, remedy) from error
    return clip.eval(), tokenizer if tokens is None else FewTokens(tokenizer, tokens)


def _folder_tokens(folder: Path, model_name: str, checkpoint: str) -> Tensor | None:
    if not (folder / CONFIG).is_file():
        raise SettingError("model_name", model_name, f"has no {CONFIG}.", "Give a folder in open_clip's form.")
    if checkpoint:
        problem = "has no effect: the folder of model_name holds the weights."
        raise SettingError("checkpoint", checkpoint, problem, "Leave it out.")
    tokens = json.loads((folder / CONFIG).read_text()).get("tokens")
    return None if tokens is None else torch.tensor(tokens)


def _check_name(open_clip: Any, model_name: str, checkpoint: str) -> None:
    names = open_clip.list_models()
    if model_name not in names:
        close = difflib.get_close_matches(model_name, names, n=3)
        remedy = f"Did you mean {close}? See open_clip.list_models()."
        raise SettingError("model_name", model_name, "is not an open_clip model.", remedy)
    if not checkpoint or Path(checkpoint).is_file():
        return
    tags = open_clip.list_pretrained_tags_by_model(model_name)
    quick, suffix = "quickgelu" in model_name, "-quickgelu"
    other = model_name.removesuffix(suffix) if quick else model_name + suffix
    # OpenAI's weights are listed with both names, and work with one of them.
    needs = (open_clip.get_pretrained_cfg(model_name, checkpoint) or {}).get("quick_gelu", quick)
    if checkpoint in tags and needs != quick and other in names:
        which = "QuickGELU" if needs else "GELU"
        problem = f"does not have the activation with which the {checkpoint} weights were trained ({which})."
        raise SettingError("model_name", model_name, problem, f"Write {other}.")
    if checkpoint not in tags:
        problem = f"is neither a file nor a tag of the weights of {model_name}."
        raise SettingError("checkpoint", checkpoint, problem, f"Choose from {', '.join(tags)}, or give a file.")


def weights_hash(clip: nn.Module) -> str:
    """SHA-256 of all weights and buffers, by which a checkpoint knows a CLIP that it does not hold."""
    digest = hashlib.sha256()
    for name, tensor in sorted(clip.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def image_size(clip: Any) -> tuple[int, int]:
    """Height and width that a CLIP takes."""
    size = clip.visual.image_size
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def statistics_of(clip: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel that the images of a CLIP are normalised with."""
    config = getattr(clip.visual, "preprocess_cfg", None) or {}
    mean, std = (tuple(config.get(part, usual)) for part, usual in zip(("mean", "std"), CLIP, strict=True))
    return mean, std


def check_image_data(clip: Any, data: object) -> None:
    """Raise a :class:`SettingError` where a data module resizes or normalises images otherwise than a CLIP takes them.

    Grey images count as three equal channels.
    """
    size, given = image_size(clip), getattr(data, "image_size", None)
    if isinstance(given, int) and (given, given) != size:
        problem = f"the model takes images of {size[0]} x {size[1]}."
        raise SettingError("data.image_size", given, problem, f"Write {size[0]}.")
    expected = statistics_of(clip)
    for part, own in zip(("mean", "std"), expected, strict=True):
        has = getattr(data, part, None)
        if not isinstance(has, (tuple, list)):
            return
        wide = tuple(has) * len(own) if len(has) == 1 else tuple(has)
        if len(wide) != len(own) or any(abs(a - b) > TOLERANCE for a, b in zip(wide, own, strict=True)):
            named = expected == CLIP and hasattr(data, "normalization")
            remedy = "Write normalization: clip." if named else f"Normalise the images with {part} {own}."
            where, value = ("data.normalization", data.normalization) if named else (f"data.{part}", tuple(has))  # type: ignore[attr-defined]
            raise SettingError(where, value, f"has the {part} {tuple(has)}, the model's images {own}.", remedy)


def check_clip_images(clip: Any, images: Any) -> None:
    """Raise a :class:`SettingError` unless images are floats of one or three channels and of a CLIP's size."""
    if not isinstance(images, Tensor) or images.dim() != 4 or not images.is_floating_point():
        given = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        remedy = "Return such a tensor from the data set or collate_fn, normalised as the model takes it."
        raise SettingError("data", given, "images must be floats (b, channels, height, width).", remedy)
    size = image_size(clip)
    if images.shape[1] not in (1, 3):
        problem = f"{images.shape[1]} channels, and the model takes 3 (or 1, repeated)."
        raise SettingError("data", tuple(images.shape), problem, "Return colour or grey images.")
    if tuple(images.shape[2:]) != size:
        problem = f"the model takes images of {size[0]} x {size[1]}."
        raise SettingError("data.image_size", tuple(images.shape[2:]), problem, f"Write {size[0]}, or resize them.")


def coloured(images: Any) -> Any:
    """Grey images as three equal channels, also in a mapping of ``images``; everything else as it is."""
    if isinstance(images, dict):
        return {**images, "images": coloured(images["images"])}
    return images.expand(-1, 3, -1, -1) if images.dim() == 4 and images.shape[1] == 1 else images
