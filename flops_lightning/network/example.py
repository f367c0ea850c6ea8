"""What an example must be for a network to be cut, and what the network must be: its rows are on their own."""

from typing import Any

import torch
from torch import Tensor, nn

from flops_lightning.errors import SettingError
from flops_lightning.network.layers import TURNED, close, coarsest, outputs_of_layers, unlike_rows
from flops_lightning.network.replay import result_of
from flops_lightning.network.rows import Rows, take_apart
from flops_lightning.network.trace import call


def two_rows(module: nn.Module, example: Any) -> Rows:
    """Two rows that differ, of which the network takes the first: of the example if it has them, or one made of it."""
    rows = Rows.of(example, setting="example")
    twice = _picked(rows, [0, 0])
    try:
        result_of(call(module, twice.clone().tree()))  # a copy: a network may write to its inputs
    except SettingError:
        raise
    except Exception as error:
        raise SettingError(
            "example", _described(example), f"{type(module).__name__} refuses it: {_line(error)}.",
            "Pass the inputs of a few samples as its forward takes them: a tensor, a tuple of arguments or a mapping "
            "of named ones, of the right shape, dtype and device.",
        ) from error  # fmt: skip
    for i in range(1, len(rows)):
        if _differ(pair := _picked(rows, [0, i])):
            return pair
    made = twice.map(lambda tensor: torch.cat([tensor[:1], _altered(tensor[:1])]))
    problem = "its rows are all equal, so it cannot show whether they depend on each other"
    remedy = "Pass two samples that differ."
    if not _differ(made):
        raise SettingError("example", _described(example), f"{problem}.", remedy)
    try:
        call(module, made.clone().tree())
    except Exception as error:
        problem = f"{problem}, and {type(module).__name__} refuses a row made of them: {_line(error)}."
        raise SettingError("example", _described(example), problem, remedy) from error
    return made


def _picked(rows: Rows, places: list[int]) -> Rows:
    return rows.index_select(0, torch.tensor(places, device=rows.device))


def _differ(pair: Rows) -> bool:
    return any(not torch.equal(tensor[0], tensor[1]) for tensor in pair.tensors.values())


def _described(example: Any) -> Any:
    tensors = take_apart(example, "example")[1].values()
    told = [f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in tensors]
    return ", ".join(told[:6]) + (", ..." if len(told) > 6 else "")


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0].rstrip('.')[:200]}"


def _altered(row: Tensor) -> Tensor:
    """The values of a row backwards, so that words stay words, and floats a little higher as well."""
    backwards = row.flatten().flip(0).view_as(row) if row.dim() > 1 else row
    if not row.is_floating_point():
        return backwards
    return backwards + torch.linspace(0.1, 1, row.numel(), dtype=row.dtype, device=row.device).view_as(row)


def check_rows(module: nn.Module, pair: Rows) -> dict[str, str]:
    """Refuse a network whose output of a row is not its own; :func:`unlike_rows` of one that is accepted.

    Each row is compared with itself beside others and beside copies of itself, which shows mixing of any kind.
    """
    name, eps = type(module).__name__, coarsest(module)

    def run(rows: Rows) -> Tensor:
        return result_of(call(module, rows.clone().tree()))

    first, two = outputs_of_layers(module, run, pair)
    if not first.dim() or len(first) != 2:
        problem = f"returned the shape {tuple(first.shape)} for 2 rows."
        raise SettingError("network", name, problem, "Make the row the first dimension of what it returns.")
    if first.isnan().any():
        problem = "returned NaN for the example."
        raise SettingError("network", name, problem, "Pass an example for which it is finite, or fix the network.")
    if not close(run(pair), first, eps):
        raise SettingError(
            "network", name, "returned other values when the same rows ran again.", "Make it deterministic in eval "
            "mode: dropout with training=self.training, no sampling, nothing kept from the call before.",
        )  # fmt: skip
    turned, three = outputs_of_layers(module, run, _picked(pair, TURNED))
    found = [(turned, TURNED), *((run(_picked(pair, order)), order) for order in ([0, 0], [1, 1]))]
    if any(each.shape[:1] != (len(order),) or not close(each, first[order], eps) for each, order in found):
        raise SettingError(
            "network", name, "returned other values for a row when other rows were beside it.",
            "Make the output of a row independent of the other rows: no statistics over the batch.",
        )  # fmt: skip
    return unlike_rows(module, two, three)
