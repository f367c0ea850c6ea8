"""Losses that are the rest of a network, and targets of unequal length for them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flops_lightning.errors import SettingError


class SuffixLoss(ABC):
    """A loss that is the rest of the network: a frozen model above the trained one.

    It is called like any loss, ``(outputs (r, ...), targets (r, ...)) -> (r,)``. It also says what a query of a sample
    costs, so that the meter, plans and :class:`~flops_lightning.allocators.CostAwareAllocator` count it and
    ``chunk_rows: auto`` makes room for it. Its parameters belong to no network: they are not trained, saved or moved.

    Only :class:`~flops_lightning.strategies.Backprop` differentiates it, and only if it is ``differentiable``.
    Predictors of gradients, an exact head and forward-mode strategies are refused.

    Attributes:
        part: What it is, for messages.
        differentiable: Whether autograd can differentiate it.
        obstacle: Why not, for messages.
        remote: Whether it runs elsewhere, so that no memory is needed for it here.

    Example:
        A frozen map above a trained one; each sample is compared with as many of its outputs as it has targets:

        >>> class Distance(SuffixLoss):
        ...     frozen = torch.full((2, 3), 0.5)
        ...
        ...     def __call__(self, outputs, targets):
        ...         wanted = targets.trimmed()
        ...         found = (outputs @ self.frozen)[:, : wanted.shape[1]]
        ...         return (targets.mask() * (found - wanted).square()).sum(1)
        ...
        ...     def flops(self, targets):
        ...         return 2.0 * 2 * targets.lengths
        >>> from flops_lightning import LikelihoodRatio, stage_network
        >>> adapter = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> strategy = LikelihoodRatio(sites=[{"stages": ["0"], "kind": "linear", "queries_per_sample": 8}], seed=0)
        >>> strategy.bind(stage_network(adapter), Distance())
        >>> targets = PaddedTargets.of([torch.ones(3), torch.ones(1)])
        >>> strategy.estimate(strategy.clean_pass(torch.ones(2, 4), targets)).loss.shape
        torch.Size([2])
    """

    part: ClassVar[str] = "the rest of the network"
    differentiable: bool = False
    obstacle: str = ""
    remote: bool = False

    @abstractmethod
    def __call__(self, outputs: Tensor, targets: Any) -> Tensor:
        """``(r,)`` losses of ``(r, ...)`` outputs."""

    @abstractmethod
    def flops(self, targets: Any) -> NDArray[np.float64]:
        """``(b,)`` floating-point operations of one query of each sample, without padding; known without a device."""

    def rows_of(self, key: Any) -> AbstractContextManager[None]:
        """Tell a loss that runs elsewhere to which :class:`NoiseKey` its rows belong while the context lasts."""
        del key
        return nullcontext()

    def check_sigma(self, outputs: Tensor, targets: Any, sigma: float) -> None:
        """Refuse noise on the outputs that it cannot resolve, at the first batch.

        Raises:
            SettingError: differences of its losses would be rounding.
        """
        del outputs, targets, sigma

    def compiled(self) -> "SuffixLoss":
        """The same loss through ``torch.compile``, for ``compile_suffixes: true``.

        Raises:
            SettingError: it cannot be compiled.
        """
        raise SettingError(
            "model.strategy.compile_suffixes", True, f"{type(self).__name__} has no compiled form.", "Write false."
        )


def refuse_derivative(loss: Any, setting: str, value: object, remedy: str) -> None:
    """Raise a :class:`SettingError` where a setting would differentiate a :class:`SuffixLoss`."""
    if isinstance(loss, SuffixLoss):
        raise SettingError(setting, value, f"would differentiate {loss.part}.", remedy)


@dataclass(eq=False)  # not frozen: with precision 64-true, Lightning converts what a batch holds in a copy of it
class PaddedTargets:
    """Sequences of unequal length, padded at the end; the host knows their lengths.

    A subset of the rows can therefore be cut to its own longest sequence without waiting for the device.

    Attributes:
        values: ``(b, t)`` entries; those beyond a sequence's length have no meaning.
        lengths: ``(b,)`` lengths.
        given: ``(b,)`` number of leading entries that are given and not to be predicted; None: zero.

    Example:
        >>> targets = PaddedTargets.of([torch.tensor([5, 6, 7]), torch.tensor([8])])
        >>> targets.values.tolist(), targets.take(torch.tensor([1, 1])).trimmed().tolist()
        ([[5, 6, 7], [8, 0, 0]], [[8], [8]])
        >>> targets.trimmed(multiple=4).shape, targets.mask().tolist()
        (torch.Size([2, 4]), [[True, True, True], [True, False, False]])
    """

    values: Tensor
    lengths: NDArray[np.int64]
    given: NDArray[np.int64] | None = None

    @classmethod
    def of(
        cls, sequences: Sequence[Tensor], padding: float = 0, given: NDArray[np.int64] | None = None
    ) -> "PaddedTargets":
        """Pad ``(t_b, ...)`` sequences."""
        padded = torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True, padding_value=padding)
        return cls(padded, np.array([len(each) for each in sequences], dtype=np.int64), given)

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, index: Tensor, samples: NDArray[np.int64] | None = None) -> "PaddedTargets":
        """The rows ``index``; ``samples`` is the same on the host (None: it is asked of the device)."""
        host = index.cpu().numpy() if samples is None else samples
        given = None if self.given is None else self.given[host]
        return PaddedTargets(self.values.index_select(0, index), self.lengths[host], given)

    def length(self, multiple: int = 1) -> int:
        """Length of the longest sequence, 1 at least, rounded up to a multiple."""
        return max(1, -(-int(self.lengths.max(initial=1)) // multiple)) * multiple

    def trimmed(self, multiple: int = 1) -> Tensor:
        """``(b, t')`` entries, cut to the longest sequence of these rows, or padded to a ``multiple``."""
        length = self.length(multiple)
        cut = self.values[:, :length]
        return torch.nn.functional.pad(cut, (0, length - cut.shape[1])) if cut.shape[1] < length else cut

    def mask(self, multiple: int = 1) -> Tensor:
        """``(b, t')`` which entries of :meth:`trimmed` belong to a sequence."""
        return self._places(multiple) < self._moved(self.lengths)

    def scored(self, multiple: int = 1) -> Tensor:
        """``(b, t')`` which of them are to be predicted."""
        belongs = self.mask(multiple)
        return belongs if self.given is None else belongs & (self._places(multiple) >= self._moved(self.given))

    def _places(self, multiple: int) -> Tensor:
        return torch.arange(self.length(multiple), device=self.values.device)

    def _moved(self, numbers: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(numbers).to(self.values.device, non_blocking=True)[:, None]

    def followed_by(self, entry: float) -> "PaddedTargets":
        """The sequences, one entry longer each."""
        longer = torch.nn.functional.pad(self.values, (0, 1))
        return PaddedTargets(longer.scatter(1, self._moved(self.lengths), entry), self.lengths + 1, self.given)

    def to(self, *device: Any, **settings: Any) -> "PaddedTargets":
        """The same on another device; the lengths stay on the host."""
        return replace(self, values=self.values.to(*device, **settings))
