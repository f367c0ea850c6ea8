"""The matrices of a Vision Transformer's blocks, one at a time: query, key, value, projection and MLP."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from experiments.predicted_cosine import RowGradients
from flops_lightning.errors import SettingError
from flops_lightning.network.staging import StagedNetwork, stage_network
from flops_lightning.queries import LossFunction, row_losses
from flops_lightning.strategies import SiteSpec
from flops_lightning.strategies.sites import resolve_sites

Noise = Literal["tensor", "module"]
"""Where noise enters: at the component's rows alone, or at their whole layer (its bias, too, where parameters move)."""
FUSED = ("query", "key", "value")
MODULES = {**dict.fromkeys(FUSED, "attn.qkv"), "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}


@dataclass(frozen=True)
class Component:
    """Rows of the weight of a linear layer.

    Attributes:
        layer: Block, counted from 1 next to the embedding, as in the paper.
        name: One of :data:`MODULES`.
    """

    layer: int
    name: str

    @property
    def stage(self) -> str:
        return f"blocks.{self.layer - 1}"

    @property
    def module(self) -> str:
        """Name of the layer."""
        return f"{self.stage}.{MODULES[self.name]}"

    def rows(self, features: int) -> slice:
        """Its rows, of a layer with so many outputs."""
        if self.name not in FUSED:
            return slice(0, features)
        part, place = features // len(FUSED), FUSED.index(self.name)
        return slice(place * part, (place + 1) * part)


def find_components(network: StagedNetwork, layers: Sequence[int], names: Sequence[str]) -> list[Component]:
    """The components of these names in these layers (empty: all layers); one that is not there is refused."""
    modules = dict(network.module.named_modules())
    depth = sum(f"blocks.{i}" in network.index for i in range(len(network)))
    if not depth:
        kind, stages = type(network.module).__name__, list(network.index)
        raise SettingError("network", kind, f"has no blocks, but the stages {stages}.", "Give a ViT of timm.")
    found = []
    for layer in layers or range(1, depth + 1):
        if not 1 <= layer <= depth:
            raise SettingError("--layers", layer, "is not a layer of this network.", f"Choose from 1 to {depth}.")
        here = {name: Component(layer, name) for name in MODULES}
        there = [name for name, each in here.items() if isinstance(modules.get(each.module), nn.Linear)]
        for name in names:
            if name not in there:
                problem = f"is not a linear layer (query, key and value: of a fused qkv) of blocks.{layer - 1}."
                raise SettingError("--components", name, problem, f"Choose from {', '.join(there) or 'none'}.")
            found.append(here[name])
    return found


@dataclass(frozen=True)
class BatchGradients:
    """What one backward pass tells of a batch.

    Attributes:
        loss: ``(b,)`` losses.
        embedding: ``(b, d)`` input of the last stage, by which allocators compare samples.
        rows: Gradients of components.
    """

    loss: Tensor
    embedding: Tensor
    rows: Mapping[Component, RowGradients]


def batch_gradients(
    network: StagedNetwork, loss: LossFunction, batch: tuple[Tensor, Tensor], components: Sequence[Component], *,
    noise: Noise,
) -> BatchGradients:  # fmt: skip
    """Exact gradients by backpropagation."""
    kept: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Any:
        return lambda _, args, output: kept.__setitem__(name, (args[0].detach(), output))

    modules = dict(network.module.named_modules())
    handles = [modules[name].register_forward_hook(keep(name)) for name in {each.module for each in components}]
    try:
        with torch.enable_grad(), network.evaluating():
            embedding = network.run(batch[0].clone().requires_grad_(), 0, len(network) - 1)
            losses = row_losses(loss, network.run(embedding, len(network) - 1), batch[1])
            deltas = torch.autograd.grad(losses.sum(), [output for _, output in kept.values()])
    finally:
        for handle in handles:
            handle.remove()
    by_module = {name: (x, delta) for (name, (x, _)), delta in zip(kept.items(), deltas, strict=True)}
    found = {}
    for each in components:
        tokens, (x, delta) = _noisy_tokens(network, each), by_module[each.module]
        x, delta = (part if tokens is None else part[:, tokens] for part in (x, delta))
        rows, bias = each.rows(delta.shape[-1]), modules[each.module].bias is not None
        if noise == "tensor":
            found[each] = RowGradients.of(x, delta[..., rows])
        else:
            found[each] = RowGradients.of(x, delta, rows, bias=bias)
    return BatchGradients(losses.detach(), embedding.detach().flatten(1), found)


def _noisy_tokens(network: StagedNetwork, component: Component) -> slice | None:
    with training_only(network, f"{component.module}.weight"):
        (site,) = resolve_sites(network, [output_site(component.stage, component.module)])
    return site.layers[0].tokens


def output_site(stage: str, module: str, **settings: Any) -> SiteSpec:
    """Noise at the output of one layer."""
    return SiteSpec(stages=[stage], kind="linear", modules=[module], **settings)


@contextmanager
def training_only(network: StagedNetwork, *names: str) -> Iterator[None]:
    """Only the parameters of these names are trained while the context lasts."""
    before = {name: p.requires_grad for name, p in network.module.named_parameters()}
    for name, parameter in network.module.named_parameters():
        parameter.requires_grad_(name in names)
    try:
        yield
    finally:
        for name, parameter in network.module.named_parameters():
            parameter.requires_grad_(before[name])


class SplitLinear(nn.Module):
    """A linear layer as several with some of its rows each, which can get noise and be trained apart."""

    def __init__(self, whole: nn.Linear, names: Sequence[str]) -> None:
        super().__init__()
        size = whole.out_features // len(names)
        for i, name in enumerate(names):
            part = nn.Linear(whole.in_features, size, bias=whole.bias is not None, dtype=whole.weight.dtype)
            part.load_state_dict({leaf: p[i * size : (i + 1) * size] for leaf, p in whole.state_dict().items()})
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.children()], dim=-1)


@dataclass(frozen=True)
class Alone:
    """A copy of a network in which one layer is trained, and this layer is all that gets noise.

    Attributes:
        network: The copy.
        stage: The layer's stage.
        module: Its name.
        rows: The component's rows of its weight.
    """

    network: StagedNetwork
    stage: str
    module: str
    rows: slice

    @classmethod
    def of(cls, network: StagedNetwork, component: Component, *, noise: Noise, parameters: bool) -> "Alone":
        """For one component; with ``tensor`` noise a fused layer is split, and of biases none is trained."""
        copied, name = copy.deepcopy(network.module), component.module
        if noise == "tensor" and component.name in FUSED:
            copied.set_submodule(name, SplitLinear(cast("nn.Linear", copied.get_submodule(name)), FUSED))
            name = f"{name}.{component.name}"
        layer = cast("nn.Linear", copied.get_submodule(name))
        for parameter in copied.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        layer.weight.requires_grad_()
        if noise == "module" and parameters and layer.bias is not None:
            layer.bias.requires_grad_()
        rows = component.rows(layer.out_features) if noise == "module" else slice(None)
        return cls(stage_network(copied), component.stage, name, rows)

    @property
    def weight(self) -> nn.Parameter:
        """The layer's."""
        return self.network.module.get_parameter(f"{self.module}.weight")
