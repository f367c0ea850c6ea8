"""Quantised language models: which they are, whether autograd follows them, and what their operations are."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

SAMPLES, LENGTH, DIRECTIONS = 4, 8, 8
STEP = 0.1
"""Of a finite difference, in the root mean square of the embeddings: far above the rounding of eight bits."""
UNEXPLAINED = 0.5
"""Share of the finite differences that a derivative may leave open; a right one leaves rounding and curvature."""
OBSTACLE = ", since autograd cannot differentiate its quantised products"


def quantized(model: nn.Module) -> bool:
    """Whether a model was quantised: by transformers, by torchao or by ``torch.ao.quantization``.

    Example:
        >>> quantized(nn.Linear(2, 2))
        False
    """
    return (
        bool(getattr(model, "is_quantized", False))
        or any(".quantized." in type(module).__module__ for module in model.modules())
        or any(type(parameter).__module__.startswith("torchao") for parameter in model.parameters())
    )


def followed_by_autograd(model: Any) -> bool:
    """Whether the derivatives of a causal language model's losses are those of autograd.

    Products whose activations are quantised as well may run backward without an error and yet leave out the largest
    part of the gradient, so finite differences of a few short texts are compared: ``L(x + h u) - L(x - h u)`` with
    ``2 h <grad L, u>``, for random directions of the embeddings. Takes some dozen passes of four texts.
    """
    embed = model.get_input_embeddings()
    ids = (torch.arange(SAMPLES * LENGTH, device=embed.weight.device) * 7 % len(embed.weight)).view(SAMPLES, LENGTH)

    def losses(x: Tensor) -> Tensor:
        logits = model(inputs_embeds=x, use_cache=False).logits[:, :-1].float()
        return cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(SAMPLES, -1).mean(1)

    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch tells of one kind of product what is found out here of all
        x = embed(ids).detach().requires_grad_()
        lost = losses(x)
        gradient = torch.autograd.grad(lost.sum(), x, allow_unused=True)[0] if lost.requires_grad else None
    if gradient is None:
        return False
    step = STEP * float(x.detach().float().square().mean().sqrt())
    drawn = torch.randn((DIRECTIONS, *x.shape), generator=torch.Generator().manual_seed(0)).to(x)
    with torch.no_grad():
        seen = torch.stack([(losses(x + step * u) - losses(x - step * u)) / (2 * step) for u in drawn])
    told = (drawn * gradient).flatten(2).sum(2)
    return float((seen - told).square().sum()) < UNEXPLAINED * float(seen.square().sum())


def without_weights(model: Any) -> Any:
    """A quantised model of transformers as it was before, on the meta device; any other as it is.

    Operations are counted in it: the products of many quantisers are ones that torch does not count.
    """
    if not (quantized(model) and hasattr(model, "config") and type(model).__module__.startswith("transformers.")):
        return model
    with torch.device("meta"):
        return type(model)(model.config).eval()
