"""Classes as a caption would name them, for models that read the names (CLIP)."""

import re
from collections.abc import Sequence
from typing import Any

from flops_lightning.errors import SettingError, import_extra

PHOTO = "a photo of a {}."
"""CoOp's and CLIP's template for photos of things."""


def in_words(names: Sequence[str]) -> tuple[str, ...]:
    """Names with spaces in the place of underscores.

    Example:
        >>> in_words(["hot_air_balloon", "dog"])
        ('hot air balloon', 'dog')
    """
    return tuple(name.replace("_", " ").strip() for name in names)


def of_capitals(names: Sequence[str]) -> tuple[str, ...]:
    """Words that begin with capitals, in small letters and apart.

    Example:
        >>> of_capitals(["AnnualCrop", "annual crop"])
        ('annual crop', 'annual crop')
    """
    return tuple(re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower() for name in in_words(names))


def imagenet_names(wnids: Sequence[str]) -> tuple[str, ...]:
    """CLIP's names of some of ImageNet's 1,000 classes, from open_clip. Two of them are the names of two classes.

    Raises:
        SettingError: open_clip is not installed, or a WordNet id is none of the 1,000.
    """
    from timm.data import ImageNetInfo

    info: Any = ImageNetInfo("imagenet-1k")
    places = {wnid: place for place, wnid in enumerate(info.label_names())}
    if unknown := [wnid for wnid in wnids if wnid not in places]:
        problem = "is none of ImageNet's 1,000 classes, so its name is not known."
        raise SettingError("class_names", unknown[0], problem, "Give the names of the classes.")
    names = _open_clip("IMAGENET_CLASSNAMES")
    return tuple(str(names[places[wnid]]) for wnid in wnids)


def imagenet_templates() -> tuple[str, ...]:
    """CLIP's 80 templates for ImageNet, from open_clip.

    Raises:
        SettingError: open_clip is not installed.
    """
    return tuple(str(template("{}")) for template in _open_clip("OPENAI_IMAGENET_TEMPLATES"))


def _open_clip(name: str) -> Sequence[Any]:
    open_clip = import_extra("open_clip", extra="clip", setting="class_names", value="ImageNet's")
    found: Sequence[Any] = getattr(open_clip, name)
    return found
