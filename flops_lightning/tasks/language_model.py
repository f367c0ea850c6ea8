"""Language models of transformers and their tokenizers, by name or folder."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flops_lightning.errors import SettingError
from flops_lightning.language.encoding import EncodedText, pack
from flops_lightning.language.targets import INSTALL

OWN = ("_name_or_path", "transformers_version", "use_cache", "dtype", "torch_dtype", "tie_word_embeddings")
"""Entries of a config that do not say which model it is."""


def _transformers(setting: str, value: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise SettingError(setting, value, f"needs the package transformers ({error}).", INSTALL) from error
    return transformers


def load_language_model(name: str, settings: Mapping[str, Any]) -> Any:
    """A causal language model in eval mode, in float32 unless ``settings`` name a dtype, and without a cache."""
    if not isinstance(name, str) or not name:
        remedy = "Write a folder or a name of the Hugging Face hub, for example HuggingFaceTB/SmolLM2-135M."
        raise SettingError("model_name", name, "is no name of a language model.", remedy)
    library = _transformers("model_name", name)
    try:
        model = library.AutoModelForCausalLM.from_pretrained(name, **{"dtype": "float32", **settings})
    except (OSError, ValueError) as error:
        problem = f"cannot be loaded ({str(error).strip().splitlines()[0]})."
        remedy = "Give a folder with config.json and weights, or a name of the Hugging Face hub."
        raise SettingError("model_name", name, problem, remedy) from error
    model.config.use_cache = False  # keys and values of every layer: memory that one pass does not need
    return model.eval()


def load_tokenizer(setting: str, name: str) -> Any:
    """The tokenizer in a folder or of a name of the hub."""
    library = _transformers(setting, name)
    try:
        return library.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        problem = f"has no tokenizer that could be loaded ({str(error).strip().splitlines()[0]})."
        raise SettingError(setting, name, problem, "Give a folder with tokenizer.json, or a name.") from error


def example_inputs(model: Any, *, branching: bool) -> dict[str, Tensor]:
    """Inputs of two short texts, with the entries that a data set's batches have; see :func:`pack`."""
    size = model.get_input_embeddings().num_embeddings
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
