"""What scores captions: a language model that continues from vectors of an adapter, wherever it runs."""

from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flops_lightning.errors import SettingError, check_whole
from flops_lightning.suffix_loss import PaddedTargets, SuffixLoss


class CaptionScorer(SuffixLoss):
    """Mean negative log-likelihood of a caption's tokens after ``k`` vectors, in a frozen language model::

        inputs = [z_1 .. z_k, E(t_1) .. E(t_m)] without the last        L_b = -1/m_b sum_j log p(t_j | z, t_<j)

    The mean is over the caption's own tokens, so every sample counts alike; the loss that transformers report is a mean
    over all tokens of a batch. As a loss it takes the adapter's ``(r, k d)`` or ``(r, k, d)`` outputs.

    Attributes:
        width: Width ``d`` of the model's embeddings.
        context: Most positions of a sequence; 0: unknown.
        visual_tokens: Number ``k`` of vectors.
        bos: Token before the vectors; None: none.
        eos: Token after each caption, which counts as its last one; None: none.

    Example:
        A scorer that likes captions to be short, whatever comes before them:

        >>> import torch
        >>> class Short(CaptionScorer):
        ...     def score(self, embeddings, ids):
        ...         return torch.from_numpy(ids.lengths).float()
        ...
        ...     def polynomial(self):
        ...         return (0.0,)
        >>> captions = PaddedTargets.of([torch.tensor([5, 6, 7]), torch.tensor([8])])
        >>> Short(width=16, visual_tokens=2)(torch.zeros(2, 32), captions)
        tensor([3., 1.])
    """  # noqa: D415 - its first line leads to a formula

    part: ClassVar[str] = "the language model"

    def __init__(
        self, width: int, *, context: int = 0, visual_tokens: int = 1, bos: int | None = None, eos: int | None = None
    ) -> None:
        check_whole("visual_tokens", visual_tokens, 1, "Write 1, or 4 for example.")
        self.width, self.context, self.visual_tokens = width, context, visual_tokens
        self.bos, self.eos = bos, eos

    def __call__(self, outputs: Tensor, targets: PaddedTargets) -> Tensor:
        """``(r,)`` losses of an adapter's outputs; ``targets`` are the captions' ids."""
        if outputs[:1].numel() not in (self.visual_tokens * self.width, 0):
            problem = (
                f"has {outputs[:1].numel()} numbers a sample, and {self.part} takes visual_tokens = "
                f"{self.visual_tokens} vectors of width {self.width}."
            )
            remedy = f"Give the adapter {self.visual_tokens * self.width} outputs, or correct visual_tokens."
            raise SettingError("adapter", tuple(outputs.shape[1:]), problem, remedy)
        return self.score(outputs.reshape(len(outputs), self.visual_tokens, self.width), targets)

    @abstractmethod
    def score(self, embeddings: Tensor | None, ids: PaddedTargets) -> Tensor:
        """``(r,)`` losses of captions after ``(r, k, d)`` vectors, or of the captions alone (None; it takes a ``bos``).

        Raises:
            SettingError: a caption that is empty or does not fit the context, or ids that the model does not know.
        """

    def flops(self, targets: PaddedTargets) -> NDArray[np.float64]:
        """``(b,)`` floating-point operations of each caption after ``k`` vectors."""
        tokens = targets.lengths + (self.eos is not None)
        return np.asarray(np.polyval(self.polynomial(), tokens), dtype=np.float64)

    @abstractmethod
    def polynomial(self) -> tuple[float, ...]:
        """Coefficients of the operations of one query in the number of the caption's tokens, the highest first."""

    def closed(self, ids: PaddedTargets) -> PaddedTargets:
        """The captions with ``eos`` after each."""
        return ids if self.eos is None else ids.followed_by(self.eos)

    def positions(self, tokens: int, *, alone: bool = False) -> int:
        """Length of the sequence for a caption of so many tokens."""
        return (0 if alone else self.visual_tokens) + (self.bos is not None) + tokens - 1

    def scored_tokens(self, ids: PaddedTargets) -> NDArray[np.int64]:
        """``(b,)`` numbers of tokens over which the loss of each caption is the mean."""
        given = 0 if ids.given is None else ids.given
        return np.asarray(ids.lengths - given + (self.eos is not None))

    def check_captions(self, embeddings: Tensor | None, captions: PaddedTargets) -> None:
        """Raise a :class:`SettingError` for captions that cannot be scored; without a look at the device."""
        if embeddings is None and self.bos is None:
            problem = "leaves nothing from which the first token of a caption without vectors could be predicted."
            raise SettingError("bos", None, problem, "Write bos: true.")
        scored, longest = captions.lengths - (0 if captions.given is None else captions.given), captions.length()
        if scored.min(initial=1) < 1:
            where = int(scored.argmin())
            raise SettingError("captions", where, "this entry of the batch has no tokens.", "Remove it from the data.")
        positions = self.positions(longest, alone=embeddings is None)
        if self.context and positions > self.context:
            room = longest - positions + self.context
            problem = f"tokens are more than the {room} for which the context of {self.context} leaves room."
            raise SettingError("captions", longest, problem, f"Write max_tokens: {room} or less, which truncates.")

    def __deepcopy__(self, memo: Any) -> "CaptionScorer":
        """Itself: copies of a network share the language model."""
        return self
