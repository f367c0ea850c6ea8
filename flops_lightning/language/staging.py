"""A causal language model of Llama's layout as stages: ``embed``, ``layers.0`` ..., ``norm``, ``head``."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flops_lightning.errors import SettingError
from flops_lightning.network.calls import replaced
from flops_lightning.network.staging import Stage, StagedNetwork

TOLERANCE = 1e-5
"""Largest difference of logits, as a share of the largest, between the stages and the model itself."""
LAYOUT = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
"""Stages beside the layers, by the names of their modules."""


def stage_causal_lm(model: nn.Module) -> StagedNetwork:
    """Cut a causal language model of transformers with Llama's layout into stages (Llama, Vicuna, Mistral, Qwen, ...).

    The stages take ``(b, t)`` token ids, or a mapping with ``input_ids`` alone, padded at the right, and end with
    ``(b, t, v)`` logits. What the layers are given beside the activation (position embeddings, masks) comes from one
    pass of the model in which no layer runs, and is kept for each length. Every other model is staged by replay:
    ``stage_network(model, example)``.

    Raises:
        SettingError: the model has another layout, or the stages do not compute what it computes.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
        >>> network = stage_causal_lm(LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)))
        >>> [stage.name for stage in network.stages]
        ['embed', 'layers.0', 'layers.1', 'norm', 'head']
        >>> network.run(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 20])
    """
    name = type(model).__name__
    inner: Any = getattr(model, "model", None)
    layers = getattr(inner, "layers", None)
    missing = [path for path in LAYOUT.values() if not _has(model, path)]
    if missing or not isinstance(layers, nn.ModuleList) or not len(layers):
        lacks = ", ".join([*missing, *([] if isinstance(layers, nn.ModuleList) else ["model.layers"])])
        problem = f"does not have the layout of Llama: there is no {lacks or 'layer'}."
        raise SettingError("network", name, problem, "Stage it by replay: stage_network(model, example).")
    calls = _LayerCalls(model)
    stages = [
        Stage("embed", _Embed(inner.embed_tokens), (LAYOUT["embed"],)),
        *(Stage(f"layers.{i}", _Layer(calls, i), (f"model.layers.{i}",)) for i in range(len(layers))),
        Stage("norm", inner.norm, (LAYOUT["norm"],)),
        Stage("head", model.get_submodule(LAYOUT["head"]), (LAYOUT["head"],)),
    ]  # fmt: skip
    network = StagedNetwork(model, tuple(stages))
    _check_equal(network, name)
    return network


def _has(model: nn.Module, path: str) -> bool:
    try:
        return isinstance(model.get_submodule(path), nn.Module)
    except AttributeError:
        return False


@dataclass(frozen=True, eq=False)
class _Embed:
    module: nn.Module

    def __call__(self, x: Any) -> Any:
        if not isinstance(x, Tensor):  # inputs of one entry, whatever they are packed in
            (x,) = x.tensors.values() if hasattr(x, "tensors") else x.values()
        return self.module(x)


@dataclass(frozen=True, eq=False)
class _Layer:
    calls: "_LayerCalls"
    index: int

    def __call__(self, x: Any) -> Any:
        output = self.calls.model.model.layers[self.index](x, **self.calls.arguments(x)[self.index])
        return output[0] if isinstance(output, tuple) else output


@dataclass(eq=False)
class _LayerCalls:
    """The keyword arguments of each layer, by length, dtype and device of the activation; all rows share them."""

    model: Any
    known: dict[Any, list[dict[str, Any]]] = field(default_factory=dict)

    def arguments(self, x: Tensor) -> list[dict[str, Any]]:
        key = (x.shape[1], x.dtype, x.device)
        if key not in self.known:
            self.known[key] = self._seen(x)
        return self.known[key]

    def _seen(self, x: Tensor) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []

        def seen(hidden: Tensor, **given: Any) -> Tensor:
            found.append(given)
            return hidden

        stand_in: Callable[..., Any] = seen
        inner = self.model.model
        kept = torch.inference_mode(False)  # a validation may be the first to see a length, and training the next
        with kept, torch.no_grad(), replaced((layer, stand_in) for layer in inner.layers):
            inner(inputs_embeds=x[:1].detach().clone(), use_cache=False)
        return found


@torch.no_grad()
def _check_equal(network: StagedNetwork, name: str) -> None:
    """Compare a short batch with the model's own pass."""
    embedding: Any = network.module.get_submodule(LAYOUT["embed"])
    weight = embedding.weight
    if weight.is_meta:
        return
    ids = torch.arange(14, device=weight.device).reshape(2, 7) * 31 % len(weight)
    with network.evaluating():
        own: Tensor = network.module(input_ids=ids, use_cache=False).logits
        staged: Tensor = network.run(ids)
    limit = max(TOLERANCE, 2 * torch.finfo(own.dtype).eps)
    difference = float((own - staged).abs().max() / own.abs().max()) if own.shape == staged.shape else float("inf")
    if not difference <= limit:
        problem = f"computes other logits than embed, layers, norm and head in a row (by {difference:.1e})."
        raise SettingError("network", name, problem, "Stage it by replay: stage_network(model, example).")
