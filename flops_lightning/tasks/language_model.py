"""What a task needs of a language model: its weights, an example of its inputs, and by what it is known again."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flops_lightning.language.encoding import EncodedText, pack
from flops_lightning.language.models import load_model

OWN = ("_name_or_path", "transformers_version", "use_cache", "dtype", "torch_dtype", "tie_word_embeddings")
"""Entries of a config that do not say which model it is."""


def load(name: str, settings: Mapping[str, Any]) -> Any:
    """A causal language model in eval mode, in float32 unless ``settings`` name a dtype, and without a cache."""
    model = load_model(name, setting="model_name", **{"dtype": "float32", **settings})
    model.config.use_cache = False  # keys and values of every layer: memory that one pass does not need
    return model.eval()


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
        flat = parameter.detach().flatten()
        ends = torch.cat([flat[:64], flat[-64:]]).cpu().contiguous().view(torch.uint8)
        digest.update(name.encode() + ends.numpy().tobytes())
    return digest.hexdigest()
