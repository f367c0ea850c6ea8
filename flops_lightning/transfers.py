"""Numbers on their way from the host to a device, without a wait for either."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(
    values: NDArray[Any] | Sequence[float] | Tensor, like: torch.device | Tensor, dtype: Any = None
) -> Tensor:
    """The values on a device; a GPU copies them from pinned memory when it comes to it, and the host goes on.

    ``like``: the device, or a tensor whose device and, unless given, dtype the values get.
    """
    device = like.device if isinstance(like, Tensor) else like
    given = values if isinstance(values, Tensor) else torch.from_numpy(np.asarray(values))
    host = given.to(dtype or (like.dtype if isinstance(like, Tensor) else None))
    if device.type == "cuda" and host.device.type == "cpu":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def on_host(values: Mapping[str, float]) -> dict[str, Tensor]:
    """Numbers for a log, as tensors that stay here: Lightning would take each float to the device, and wait for it.

    Not for what is summed over the ranks of an NCCL group.
    """
    return {name: torch.tensor(float(value)) for name, value in values.items()}
