"""Captions as tokens, and batches of them with what they describe; no Lightning here."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from flops_lightning.suffix_loss import PaddedTargets


class ReadsCaptions(Protocol):
    """What turns captions into tokens: a task, or an object in its place.

    Attributes:
        caption_context: Tokens that there is room for in a caption, with its question; 0: it is not known.
        reads_instructions: Whether the question stands before a caption.
    """

    caption_context: int
    reads_instructions: bool

    def caption_ids(self, captions: Sequence[str]) -> Sequence[Sequence[int]]:
        """The tokens of each caption."""


class CaptionTokens:
    """Captions as tokens, by number."""

    def __init__(self, ids: Sequence[Sequence[int]], given: Sequence[int] | None = None) -> None:
        """Keep ids in one tensor: half a million small ones would take as many objects.

        ``given``: how many at the beginning of each are its question; None: there are none.
        """
        self.lengths = np.array([len(each) for each in ids], dtype=np.int64)
        self._given = None if given is None else np.array(given, dtype=np.int64)
        self._flat = torch.tensor([token for each in ids for token in each], dtype=torch.int32)
        self._ends = self.lengths.cumsum()

    def targets(self, index: Tensor) -> PaddedTargets:
        """Those of the captions ``index (b,)``."""
        parts = [self._flat[self._ends[i] - self.lengths[i] : self._ends[i]].long() for i in index.tolist()]
        return PaddedTargets.of(parts, given=None if self._given is None else self._given[index.numpy()])

    def batch(self, items: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, PaddedTargets]:
        """Items in their order."""
        images, index = zip(*items, strict=True)
        return torch.stack(images), self.targets(torch.stack(index))


def shortest_first(images: Tensor, captions: PaddedTargets) -> tuple[Tensor, PaddedTargets]:
    """The same batch, sorted by length: chunks of neighbours need little padding."""
    order = torch.from_numpy(np.argsort(captions.lengths, kind="stable"))
    return images[order], captions.take(order)


class CaptionSet(Dataset[tuple[Tensor, ...]]):
    """Captions of a part, each with its photo; items are ``(image, number of the caption)``.

    Attributes:
        photos: The photos, each once.
        places: ``(n,)`` which of them each caption is of.
        captions: ``(n,)`` numbers of the captions.
        features: ``(photos, ...)`` what takes the place of the images; None: nothing does.
    """

    def __init__(self, photos: Dataset[tuple[Tensor, ...]], places: Sequence[int], captions: Sequence[int]) -> None:
        self.photos, self.places = photos, torch.tensor(places, dtype=torch.long)
        self.captions = torch.tensor(captions, dtype=torch.long)
        self.features: Tensor | None = None

    @property
    def files(self) -> list[str]:
        """The path of the photo of each caption; none where photos are no files."""
        paths = getattr(self.photos, "files", None)
        return [] if paths is None else [paths[place] for place in self.places.tolist()]

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        place = int(self.places[index])
        image = self.photos[place][0] if self.features is None else self.features[place]
        return image, self.captions[index]
