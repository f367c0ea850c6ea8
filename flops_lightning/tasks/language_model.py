"""What a task needs of a language model: its weights, an example of its inputs, and by what it is known again."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flops_lightning.errors import SettingError
from flops_lightning.language.encoding import EncodedText, pack
from flops_lightning.language.models import load_model
from flops_lightning.language.quantized import OBSTACLE, followed_by_autograd, quantized
from flops_lightning.language.targets import TargetKind
from flops_lightning.strategies import Backprop, ForwardMode, LikelihoodRatio, WeightForwardMode

OWN = ("_name_or_path", "transformers_version", "use_cache", "dtype", "torch_dtype", "tie_word_embeddings")
"""Entries of a config that do not say which model it is."""


def load(name: str, settings: Mapping[str, Any]) -> Any:
    """A causal language model in eval mode, in float32 unless ``settings`` name a dtype, and without a cache."""
    model = load_model(name, setting="model_name", **{"dtype": "float32", **settings})
    model.config.use_cache = False  # keys and values of every layer: memory that one pass does not need
    return model.eval()


def check_derivatives(model: Any, strategy: Any, kind: TargetKind) -> None:
    """Refuse a strategy that would differentiate quantised products which autograd does not follow.

    :class:`Backprop` and forward mode run through all layers, :class:`LikelihoodRatio` through those of a site, which
    a prompt, a prefix and the head are without.
    """
    whole = isinstance(strategy, (Backprop, ForwardMode, WeightForwardMode))
    within = isinstance(strategy, LikelihoodRatio) and kind not in ("prompt", "prefix", "head")
    if (whole or within) and quantized(model) and not followed_by_autograd(model):
        problem = f"cannot compute the derivatives of the layers{OBSTACLE}."
        remedy = "Take MeZO, SPSA or EvolutionStrategies, or quantise nothing but weights (Int8WeightOnlyConfig)."
        raise SettingError("model.strategy", type(strategy).__name__, problem, remedy)


def example_inputs(model: Any, *, branching: bool) -> dict[str, Tensor]:
    """Inputs of two short texts, with the entries that a data set's batches have; see :func:`pack`."""
    size = len(model.get_input_embeddings().weight)
    first, second = ([(7 * i + j) % size for j in range(8)] for i in (1, 2))
    texts = [EncodedText(ids[:4], [ids[4:6], ids[5:8]] if branching else [ids[4:]]) for ids in (first, second)]
    inputs, _ = pack(texts, branching=branching)
    return moved(inputs, model)


def moved(inputs: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Inputs on the model's device, masks in its dtype."""
    device = model.get_input_embeddings().weight.device
    return {n: t.to(device, model.dtype) if t.is_floating_point() else t.to(device) for n, t in inputs.items()}


@torch.no_grad()
def fingerprint(model: Any, frozen: Mapping[str, nn.Parameter]) -> str:
    """By which a checkpoint knows the weights that it does not hold: SHA-256 of the config and the ends of each."""
    config = {name: value for name, value in model.config.to_dict().items() if name not in OWN}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in sorted(frozen.items()):
        for flat in (part.detach().flatten() for part in _parts(parameter)):
            ends = torch.cat([flat[:64], flat[-64:]]).cpu().contiguous().view(torch.uint8)
            digest.update(name.encode() + ends.numpy().tobytes())
    return digest.hexdigest()


def _parts(parameter: Any) -> list[Tensor]:
    """The tensors of which a parameter consists: whole numbers and scales, where torchao quantised it."""
    if not hasattr(parameter, "__tensor_flatten__"):
        return [parameter]
    return [getattr(parameter, name) for name in parameter.__tensor_flatten__()[0]]
