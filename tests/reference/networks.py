"""Small float64 networks, their losses, and where noise enters them, for the tests."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from flops_lightning.network.staging import stage_network
from flops_lightning.queries import CleanPass
from flops_lightning.strategies import LikelihoodRatio, SiteSpec

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, reduction="none")


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().flatten(1).sum(1)


def brittle_loss(bad: float, limit: float) -> Loss:
    """Squared error that is ``bad`` where the first output exceeds a limit."""
    return lambda output, target: torch.where(output[:, 0] > limit, bad, squared_error(output, target))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shaken(module: nn.Module, *, scale: float = 0.1, seed: int = 0) -> nn.Module:
    """The module in float64 with every parameter moved, so that none is at a special value such as 0 or 1."""
    module.double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return module


def tiny_vit(*, patch_size: int = 4, **kwargs: Any) -> nn.Module:
    """A timm ViT for 8x8 images: 4 patches (or 16) of 16 features, 3 blocks of 2 heads, 5 classes."""
    sizes = {"img_size": 8, "in_chans": 1, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 5}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vit = timm.create_model("vit_tiny_patch16_224", patch_size=patch_size, **{**sizes, **kwargs})
    return shaken(vit)


class TokenMean(nn.Module):
    """``(b, t, i) -> (b, i)``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class Shift(nn.Module):
    """``h + p``: the Jacobian in the parameter, of this shape, is the identity."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.zeros(shape, dtype=torch.float64))

    def forward(self, h: Tensor) -> Tensor:
        return h + self.p


class Prompted(nn.Module):
    """Prompt tokens of its own before those of the input, as in visual prompt tuning."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.zeros(1, 2, 3))
        self.layer = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.layer(torch.cat([self.prompt.expand(len(x), -1, -1), x], dim=1))


def token_network() -> nn.Sequential:
    """Layers on ``(b, t, 3)``, the mean over tokens, and a head with 2 outputs; cheap enough for Monte Carlo."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.Sequential(nn.LayerNorm(3), nn.GELU(), TokenMean()),
            nn.Linear(3, 2),
        )  # fmt: skip
    return shaken(net)


def freeze(module: nn.Module, *names: str) -> None:
    """Freeze the parameters of these names."""
    for name, parameter in module.named_parameters():
        if name in names:
            parameter.requires_grad_(False)


def bound_to(kind: type[Any], module: nn.Module, loss: Loss, sites: Sequence[dict[str, Any]], **settings: Any) -> Any:
    """A strategy of a class, bound to a network; sites as keyword dictionaries."""
    strategy = kind(sites=[SiteSpec(**site) for site in sites], **{"seed": 7, **settings})
    strategy.bind(stage_network(module), loss)
    return strategy


bound = partial(bound_to, LikelihoodRatio)


def gradients(module: nn.Module) -> dict[str, Tensor | None]:
    """``.grad`` of every parameter, by name, taken away from the module."""
    found = {name: p.grad for name, p in module.named_parameters()}
    for parameter in module.parameters():
        parameter.grad = None
    return found


def estimated(
    strategy: LikelihoodRatio, x: Tensor, y: Tensor, counts: Tensor | None = None
) -> tuple[CleanPass, dict[str, Tensor | None]]:
    """One clean pass and one estimate of all sites, and the gradients that it wrote."""
    clean = strategy.clean_pass(x, y)
    strategy.estimate(clean, counts)
    return clean, gradients(strategy.network.module)


def call(module: nn.Module, inputs: Any, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
    """The output for a tensor, a tuple of arguments or a mapping of named ones, with other parameters if given."""
    inputs = tree_map(torch.clone, inputs)  # the network may work in place
    named = inputs if isinstance(inputs, dict) else {}
    args = () if named else inputs if isinstance(inputs, tuple) else (inputs,)
    output = functional_call(module, dict(parameters or {}), args, named)
    return getattr(output, "logits", output)


def autograd_gradient(module: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Gradient of the mean loss by backpropagation; zeros for parameters that do not matter."""
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss(module(x), y).mean(), list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), grads, strict=True)}


def stage_output(module: nn.Module, stage: str) -> nn.Module:
    """The submodule whose output is the output of a stage."""
    if isinstance(module, nn.Sequential):
        return module.get_submodule(stage)
    return module.get_submodule({"embed": "norm_pre", "pool": "head_drop"}.get(stage, stage))


def assert_entries(found: Mapping[str, Any], expected: Mapping[str, Any], *, rtol: float = 0, atol: float = 0) -> None:
    """Compare the tensors that are expected by name; without tolerances to the last bit."""
    torch.testing.assert_close({name: found[name] for name in expected}, dict(expected), rtol=rtol, atol=atol)
