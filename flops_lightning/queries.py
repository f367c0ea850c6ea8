"""The query engine: ragged counts -> rows -> fixed-size chunks -> one loss a row.

A row is one (sample, query) pair. Rows are packed sample by sample into chunks of one fixed size, whatever the counts,
so uneven allocation costs nothing and a suffix always sees the same shape.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flops_lightning.errors import SettingError
from flops_lightning.network.rows import Rows, empty_like, gather, value_of, write_rows
from flops_lightning.network.staging import StagedNetwork
from flops_lightning.phases import phase
from flops_lightning.suffix_loss import SuffixLoss
from flops_lightning.transfers import to_device

EMBEDDING_FEATURES = 4096

LossFunction = Callable[[Tensor, Any], Tensor]
"""``(outputs (r, ...), targets (r, ...)) -> (r,)``: one loss a row, no reduction. Targets may be nested tensors.

One that is the rest of the network is a :class:`~flops_lightning.suffix_loss.SuffixLoss`."""


@dataclass(frozen=True, eq=False)
class CleanPass:
    """The unperturbed forward pass of a batch and everything queries reuse of it.

    Attributes:
        targets: ``(b, ...)`` targets; a tensor, or nested tensors with the same first dimension.
        activations: Kept activations by index (the input of stage ``i``; ``len(stages)`` is the output), each ``(b,
            ...)``: a tensor, or :class:`~flops_lightning.network.rows.Rows` where a stage reads several.
        output: ``(b, ...)`` output of the network, float32 at least.
        loss: ``(b,)`` clean losses.
        embedding: ``(b, d)`` input of the last stage: for a ViT the top CLS token (or pooled feature); flattened, and
            averaged down to ``EMBEDDING_FEATURES`` where it is larger.
        draw: The draw counter of this batch, part of every noise key.
    """

    targets: Any
    activations: dict[int, Any]
    output: Tensor
    loss: Tensor
    embedding: Tensor
    draw: int

    @property
    def batch_size(self) -> int:
        """Number of samples ``b``."""
        return self.loss.shape[0]

    def stand_ins(self) -> Tensor:
        """``(b,)`` each sample's own index, or that of a sample with a finite loss where its own is not.

        A lost sample's gradient has weight zero, but zero times the NaN of its activations would be NaN.
        """
        finite = torch.isfinite(self.loss)
        return torch.where(finite, torch.arange(len(finite), device=finite.device), finite.int().argmax())


@torch.no_grad()
def clean_pass(
    network: StagedNetwork, loss: LossFunction, inputs: Any, targets: Any, *, keep: Collection[int], draw: int,
    rows: int, start: int = 0,
) -> CleanPass:  # fmt: skip
    """Run the stages from ``start`` on, unperturbed, ``rows`` samples at a time, and keep activations in ``keep``."""
    last = len(network) - 1
    with phase("clean pass"):
        activations = _run_and_keep(network, inputs, start, {*keep, last}, rows)
        embedding = _embedding(value_of(activations.get(last, activations[len(network)])))
        if last not in keep:
            activations.pop(last, None)
        output = at_least_float32(activations[len(network)])
        return CleanPass(targets, activations, output, _batch_losses(loss, output, targets, rows), embedding, draw)


def _batch_losses(loss: LossFunction, output: Tensor, targets: Any, rows: int) -> Tensor:
    """``(b,)`` losses; what is the rest of the network runs ``rows`` samples at a time, as the network does."""
    if not isinstance(loss, SuffixLoss) or len(output) <= rows:
        return row_losses(loss, output, targets)
    parts = []
    for place in torch.arange(len(output)).split(rows):
        index = to_device(place, output.device)
        parts.append(row_losses(loss, output[index], gather(targets, index, place.numpy())))
    return torch.cat(parts)


def longest_loss(loss: LossFunction, targets: Any) -> Callable[[Tensor], object] | None:
    """Runs a loss that is the rest of the network for any number of outputs, at the dearest target.

    None for other losses, and for one that runs elsewhere.
    """
    if not isinstance(loss, SuffixLoss) or loss.remote:
        return None
    dearest = int(loss.flops(targets).argmax())

    def run(output: Tensor) -> Tensor:
        samples = np.full(len(output), dearest)
        index = to_device(samples, output.device)
        return row_losses(loss, output, gather(targets, index, samples))

    return run


@contextmanager
def rows_of(network: StagedNetwork, loss: LossFunction, key: Any) -> Iterator[None]:
    """Tell what runs elsewhere, network or loss, to which :class:`NoiseKey` its rows belong while the context lasts.

    Those of the site ``clean`` are unperturbed.
    """
    with network.rows_of(key), loss.rows_of(key) if isinstance(loss, SuffixLoss) else nullcontext():
        yield


@torch.no_grad()
def refresh(
    network: StagedNetwork, loss: LossFunction, clean: CleanPass, start: int, *, rows: int, keep: Collection[int] = ()
) -> CleanPass:
    """The clean pass after the parameters of stages ``>= start`` changed: the prefix is kept, the rest runs again."""
    h, targets, draw = clean.activations[start], clean.targets, clean.draw
    again = clean_pass(network, loss, h, targets, keep=keep, draw=draw, rows=rows, start=start)
    embedding = clean.embedding if start == len(network) else again.embedding
    below = {i: h for i, h in clean.activations.items() if i <= start}
    return replace(again, activations=again.activations | below, embedding=embedding)


def _embedding(h: Tensor) -> Tensor:
    # Samples are compared by it on every batch; a flattened feature map would cost more than it tells.
    flat = h.reshape(len(h), -1) if h.is_floating_point() else h.reshape(len(h), -1).float()
    if flat.shape[1] <= EMBEDDING_FEATURES:
        return flat
    return torch.nn.functional.adaptive_avg_pool1d(flat[:, None], EMBEDDING_FEATURES)[:, 0]


def _run_and_keep(
    network: StagedNetwork, inputs: Tensor | Rows, start: int, keep: Collection[int], rows: int
) -> dict[int, Any]:
    """Activations from ``start`` on: those in ``keep`` and the output."""
    if start:  # parameters changed: autocast must not reuse its copies of them
        torch.clear_autocast_cache()
    kept: dict[int, Any] = {}

    def copy(i: int, h: Tensor | Rows, first: int) -> None:
        # Into its place at once: parts to be joined at the end would take twice the memory.
        if i not in kept:
            kept[i] = empty_like(h, len(inputs))
        write_rows(kept[i], first, h)

    with network.evaluating():
        for first in range(0, max(1, len(inputs)), rows):
            # Not by a name here: that would hold a stage's input while the others run.
            output = network.visit(inputs[first : first + rows], start, keep, partial(copy, first=first))
            copy(len(network), output, first)
    return kept


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32 if it is in half precision: differences of losses need it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def full_precision(tensor: Tensor) -> torch.autocast:
    """Products in the dtype of their operands, where the forward pass around them runs in half precision."""
    return torch.autocast(tensor.device.type, enabled=False)


def row_losses(loss: LossFunction, output: Tensor, targets: Any) -> Tensor:
    """``(r,)`` losses in float32 at least, under autocast too, checked for their shape."""
    with full_precision(output), phase("suffix") if isinstance(loss, SuffixLoss) else nullcontext():
        losses = loss(at_least_float32(output), targets)
    if losses.shape != output.shape[:1]:
        raise SettingError(
            "loss", getattr(loss, "__name__", type(loss).__name__),
            f"returned the shape {tuple(losses.shape)} for {output.shape[0]} rows.",
            "Return one loss a row, for example cross_entropy(..., reduction='none').",
        )  # fmt: skip
    return at_least_float32(losses)


@dataclass(frozen=True, eq=False)
class Chunk:
    """A fixed number of rows of one site.

    Attributes:
        samples: ``(r,)`` place of each row's sample in the batch, ascending; padding repeats the last row's.
        queries: ``(r,)`` query index of each row.
        rows: Number of real rows; those beyond are padding.
    """

    samples: NDArray[np.int64]
    queries: NDArray[np.int64]
    rows: int

    @property
    def span(self) -> slice:
        """The consecutive samples that this chunk touches."""
        return slice(int(self.samples[0]), int(self.samples[-1]) + 1)


@dataclass(frozen=True, eq=False)
class RowPlan:
    """All rows of one site in one step, and how they are cut into chunks."""

    samples: NDArray[np.int64]
    queries: NDArray[np.int64]
    chunk_rows: int

    def __iter__(self) -> Iterator[Chunk]:
        for start in range(0, len(self.samples), self.chunk_rows):
            samples, queries = (part[start : start + self.chunk_rows] for part in (self.samples, self.queries))
            pad = self.chunk_rows - len(samples)
            yield Chunk(np.pad(samples, (0, pad), "edge"), np.pad(queries, (0, pad), "edge"), len(samples))


def plan_rows(counts: NDArray[np.int64], max_rows: int, *, first_query: int = 0, multiple: int = 1) -> RowPlan:
    """Rows for ragged counts, sample by sample.

    The chunk size is the largest multiple of ``multiple`` up to ``max_rows`` that leaves the least padding for this
    number of chunks; it depends on the sum of the counts alone, so a fixed budget gives a fixed shape.

    A sample's queries begin at ``first_query`` (those before it were pilots), and ``multiple`` rows stay in one
    chunk.
    """
    total = int(counts.sum())
    samples = np.repeat(np.arange(len(counts)), counts)
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    units, most = -(-total // multiple), max(1, max_rows // multiple)
    chunks = max(1, -(-units // most))
    chunk_rows = multiple * max(1, -(-units // chunks))
    return RowPlan(samples, np.arange(total) - starts + first_query, chunk_rows)


def check_counts(counts: Tensor, sites: int, samples: int, *, multiple: int, least: int) -> NDArray[np.int64]:
    """``(s, b)`` counts on the host.

    Counts may be ``(b,)``, the same at every site. Each is a ``multiple``, and 0 or at least ``least``.
    """
    shape, remedy = (sites, samples), "Round with allocators.rounding.largest_remainder."
    if counts.is_floating_point() or counts.is_complex():
        raise SettingError("counts", str(counts.dtype), "must be integers.", remedy)
    table = counts.cpu().numpy().astype(np.int64)
    if table.shape not in (shape, shape[1:]):
        raise SettingError(
            "counts", tuple(table.shape), f"does not fit {sites} sites and {samples} samples.",
            f"Give integer counts of shape {shape} or {shape[1:]}.",
        )  # fmt: skip
    wrong = table[(table < 0) | (table % multiple > 0)]
    if wrong.size:
        raise SettingError(
            "counts", int(wrong[0]), f"every count must be 0 or a positive multiple of {multiple}.", remedy
        )
    few = table[(table > 0) & (table < least)]
    if few.size:
        raise SettingError(
            "counts", int(few[0]), "a single query has no others to be compared with.",
            "Give every sample 0, 2 or more (min_queries: 2), or use variant: baseline.",
        )  # fmt: skip
    return np.broadcast_to(table, shape).copy()
