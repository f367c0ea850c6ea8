"""Which layers of a network give one line a row, found by running two rows and three."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flops_lightning.network.calls import uncompiled
from flops_lightning.network.rows import Rows, has_derivative
from flops_lightning.network.staging import StagedNetwork

TURNED = [1, 0, 1]


def layers_unlike_rows(network: StagedNetwork, inputs: Tensor | Rows) -> dict[str, str]:
    """What is wrong with the layers whose output is not one line a row, by name, from two rows of a batch.

    Layers are modules with parameters of their own.
    """
    ends = inputs.index_select(0, torch.tensor([0, len(inputs) - 1], device=inputs.device))
    with torch.no_grad(), network.evaluating(), uncompiled(network.module):
        two, three = (
            outputs_of_layers(network.module, lambda rows: network.run(rows.clone(), 0), rows)[1]
            for rows in (ends, ends.index_select(0, torch.tensor(TURNED, device=inputs.device)))
        )
    return unlike_rows(network.module, two, three)


def unlike_rows(module: nn.Module, two: Mapping[str, Tensor], three: Mapping[str, Tensor]) -> dict[str, str]:
    """The same from what :func:`outputs_of_layers` gave for two rows and for :data:`TURNED`, three of them."""
    found: dict[str, str] = {}
    eps = coarsest(module)
    for name in _layers(module):
        a, b = two.get(name), three.get(name)
        if a is None or b is None:
            found[name] = "did not run exactly once in the forward pass."
        elif (len(a), len(b)) != (2, 3):
            found[name] = (
                f"returns {len(a)} lines for 2 rows and {len(b)} for 3: its first axis is not that of the rows."
            )
        elif not close(b, a[TURNED], eps):
            found[name] = "returns lines that are not those of the rows, one by one."
    return found


def _layers(module: nn.Module) -> dict[str, nn.Module]:
    named = module.named_modules()
    return {name: each for name, each in named if next(each.parameters(recurse=False), None) is not None}


def outputs_of_layers(
    module: nn.Module, run: Callable[[Any], Tensor], rows: Tensor | Rows
) -> tuple[Tensor, dict[str, Tensor]]:
    """The output of a run, and some of the numbers in each line of what layers return, ``(lines, n)``, by name."""
    seen: dict[str, Tensor] = {}

    def hook_of(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.dim():
                flat = output.reshape(len(output), -1)
                seen[name] = flat[:, :: max(1, flat.shape[1] // 256)].clone()

        return hook

    handles = [layer.register_forward_hook(hook_of(name)) for name, layer in _layers(module).items()]
    try:
        return run(rows), seen
    finally:
        for handle in handles:
            handle.remove()


def coarsest(module: nn.Module) -> float:
    """The largest step between numbers next to 1 in the dtypes that a network computes in."""
    dtypes = {p.dtype for p in module.parameters() if p.is_floating_point()}
    device = next((p.device.type for p in module.parameters()), "cpu")
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    tf32 = 2.0**-10 if device == "cuda" and torch.float32 in dtypes else 0.0  # kernels may take it, or not
    return max([tf32, *(torch.finfo(dtype).eps for dtype in dtypes)])


def close(a: Tensor, b: Tensor, eps: float) -> bool:
    """Whether two tensors agree as far as their dtype tells: kernels round otherwise for another number of rows."""
    if not has_derivative(b):
        return torch.equal(a, b)
    finite = b[b.isfinite()].abs()
    tolerance = max(eps, torch.finfo(b.dtype).eps) ** 0.55  # float64 2e-9, float32 2e-4, float16 0.02, bfloat16 0.07
    atol = tolerance * float(finite.max()) / 10 if len(finite) else 0.0
    return a.shape == b.shape and torch.allclose(a, b, rtol=tolerance, atol=atol, equal_nan=True)
