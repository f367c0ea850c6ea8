"""Communication between ranks: gradients in flat buckets, statistics row by row; nothing in a single process.

A rank is a process that trains a replica of the network on its share of each batch. The loss is the mean over the
samples of all ranks, so a rank's gradient, the mean over its own samples, counts by their number.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET = 2**24  # numbers of one bucket: 64 MiB in float32, what reducing takes beside the gradients


class Communicator:
    """The ranks of a run, as one of them sees it; here there is one. ``sent``: bytes in collective operations."""

    rank, size, sent = 0, 1, 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks of a tensor of one shape, in place; the same bits on every rank."""
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors, of one shape, of all ranks in their order."""
        return [tensor]


class ProcessGroup(Communicator):
    """The ranks of torch's default process group."""

    def __init__(self) -> None:
        """Read rank and size of the default group."""
        self.rank, self.size, self.sent = dist.get_rank(), dist.get_world_size(), 0

    def sum(self, tensor: Tensor) -> Tensor:
        """See :class:`Communicator`."""
        self.sent += tensor.numel() * tensor.element_size()
        dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """See :class:`Communicator`."""
        self.sent += tensor.numel() * tensor.element_size()
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous())
        return parts


def present_communicator() -> Communicator:
    """The process group where there is one with several ranks, else the only rank."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return ProcessGroup() if several else Communicator()


def gather_lines(communicator: Communicator, lines: Tensor) -> list[Tensor]:
    """``(n_r, ...)`` tensors of all ranks; only their first dimensions may differ."""
    if communicator.size == 1:
        return [lines]
    own = torch.tensor([len(lines)], device=lines.device)
    sizes = [int(n) for n in torch.cat(communicator.gather(own)).tolist()]
    padded = lines.new_zeros((max(sizes), *lines.shape[1:]))
    padded[: len(lines)] = lines
    return [part[:n] for part, n in zip(communicator.gather(padded), sizes, strict=True)]


def gather_plain(communicator: Communicator, value: Any, *, device: torch.device) -> list[Any]:
    """Numbers, strings, lists and dictionaries of all ranks, by way of JSON."""
    if communicator.size == 1:
        return [value]
    text = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=device)
    return [json.loads(bytes(line.tolist())) for line in gather_lines(communicator, text)]


def mean_over_ranks(communicator: Communicator, value: Tensor, weight: float) -> Tensor:
    """``sum_r w_r v_r / sum_r w_r`` of a tensor of one shape; a rank with weight 0 need not have a finite value."""
    if communicator.size == 1:
        return value
    weighted = value * weight if weight else torch.zeros_like(value)
    flat = communicator.sum(torch.cat([weighted.flatten(), weighted.new_full((1,), weight)]))
    return flat[:-1].view_as(value) / flat[-1]


@torch.no_grad()
def reduce_gradients(communicator: Communicator, parameters: Iterable[nn.Parameter], *, weight: float) -> bool:
    """Replace every ``.grad`` by its weighted mean over the ranks.

    Args:
        communicator: The ranks.
        parameters: The same parameters in the same order on every rank. One whose ``.grad`` is None on some ranks
            counts as zero there; where it is None on all, it stays so.
        weight: Of this rank, the number of its samples; 0 for a rank without any, but not for all.

    Returns:
        Whether any rank has a gradient, on which all ranks agree.
    """
    given = list(parameters)
    if communicator.size == 1:
        return any(p.grad is not None for p in given)
    # No rank alone knows which gradients exist, and all must reduce the same ones.
    header = torch.tensor([weight, *(float(p.grad is not None) for p in given)], dtype=torch.float64)
    total, *ranks_with = communicator.sum(header.to(given[0].device)).tolist()
    reduced = [p for p, n in zip(given, ranks_with, strict=True) if n]
    for bucket in _buckets(reduced):
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = communicator.sum(torch.cat([part.flatten() for part in parts]).mul_(weight)).div_(total)
        for p, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            p.grad = part.view_as(p).clone() if p.grad is None else p.grad.copy_(part.view_as(p))
    return bool(reduced)


def _buckets(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Runs of parameters of one dtype with at most :data:`BUCKET` numbers (a larger parameter is alone)."""
    buckets: list[list[nn.Parameter]] = []
    for p in parameters:
        full = not buckets or sum(q.numel() for q in buckets[-1]) + p.numel() > BUCKET
        if full or p.dtype != buckets[-1][0].dtype:
            buckets.append([])
        buckets[-1].append(p)
    return buckets


@torch.no_grad()
def broadcast_state(module: nn.Module) -> None:
    """Give every rank the parameters and buffers of rank 0."""
    for tensor in (*module.parameters(), *module.buffers()):
        dist.broadcast(tensor.detach(), src=0)
