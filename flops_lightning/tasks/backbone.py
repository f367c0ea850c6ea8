"""timm backbones: made by name, loaded from local files, frozen by pattern, exported as plain timm weights."""

import difflib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from flops_lightning.errors import SettingError
from flops_lightning.tasks.parameter_efficient import ADDED, plain_weights

_OWN_PREFIX = "backbone."


def create_backbone(name: str, model_kwargs: Mapping[str, Any], *, num_classes: int, pretrained: bool) -> nn.Module:
    """A timm model; raises SettingError for an unknown name, wrong arguments or weights that cannot be fetched."""
    import timm  # slow to import

    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        remedy = f"Did you mean {close}? See timm.list_models()."
        raise SettingError("model_name", name, "is not a timm model.", remedy)
    if pretrained and not timm.is_model_pretrained(name):
        raise SettingError("pretrained", True, f"timm has no weights for {name!r}.", "Give a `checkpoint` file.")
    if "num_classes" in model_kwargs:
        given = model_kwargs["num_classes"]
        raise SettingError("model_kwargs.num_classes", given, "comes from the data.", "Remove it.")
    if model_kwargs.get("features_only"):
        raise SettingError("model_kwargs.features_only", True, "gives features, no logits.", "Remove it.")
    if dropped := next((key for key, value in model_kwargs.items() if "drop" in key and value), None):
        problem = "has no effect: queries run in eval mode and differ from the clean pass by their noise alone."
        raise SettingError(f"model_kwargs.{dropped}", model_kwargs[dropped], problem, "Write 0 or leave it out.")
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **model_kwargs)
    except TypeError as error:
        problem = f"{name} refuses them: {error}."
        raise SettingError("model_kwargs", dict(model_kwargs), problem, "Remove what it does not take.") from error
    except Exception as error:
        if not pretrained:
            raise
        problem = f"the weights of {name} could not be fetched ({type(error).__name__})."
        remedy = "Check the connection, or download the file and give it as `checkpoint`."
        raise SettingError("pretrained", True, problem, remedy) from error
    return model


def load_weights(backbone: nn.Module, path: str) -> None:
    """Load plain timm weights or a checkpoint of this project: safetensors, or what ``torch.load`` reads.

    A head with another number of classes stays as initialised, which the log says; other differences are refused.
    """
    state = _read(Path(path))
    own = backbone.state_dict()
    named = getattr(backbone, "pretrained_cfg", {}).get("classifier") or "head"
    heads = tuple(f"{name}." for name in ([named] if isinstance(named, str) else named))
    head = [name for name in state if name.startswith(heads) and name in own and state[name].shape != own[name].shape]
    if head:
        rank_zero_info(f"checkpoint: the head has another number of classes, {head} start fresh.")
    other = [n for n in state if n in own and n not in head and state[n].shape != own[n].shape]
    if other:
        first = f"{other[0]} is {tuple(state[other[0]].shape)}, the model has {tuple(own[other[0]].shape)}"
        remedy = "Give the `model_name` and `model_kwargs` (img_size, depth, reg_tokens, ...) it was trained with."
        raise SettingError("checkpoint", path, f"has {len(other)} tensors of another shape: {first}.", remedy)
    result = backbone.load_state_dict({k: v for k, v in state.items() if k not in head}, strict=False)
    added = [name for name in result.unexpected_keys if any(part in name for part in ADDED)]
    if added:
        problem = f"is of a run with LoRA or prompts and stores them separately: {added[0]}."
        remedy = "Give that run's model.safetensors (export_weights), which has them merged."
        raise SettingError("checkpoint", path, problem, remedy)
    missing = [name for name in result.missing_keys if name not in head]
    if missing or result.unexpected_keys:
        raise SettingError(
            "checkpoint", path, f"is of another model: missing {missing[:3]} ({len(missing)} in all), "
            f"unexpected {result.unexpected_keys[:3]} ({len(result.unexpected_keys)} in all).",
            "Give the `model_name` and `model_kwargs` it was trained with.",
        )  # fmt: skip


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise SettingError("checkpoint", str(path), "is not a file.", "Give the path of a .safetensors or .ckpt file.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        problem = f"cannot be read ({type(error).__name__}: {str(error).splitlines()[0][:80]})."
        remedy = "Give an intact safetensors file, or one saved by torch.save that holds tensors only."
        raise SettingError("checkpoint", str(path), problem, remedy) from error
    if isinstance(state, dict):
        state = state.get("state_dict", state.get("model", state))
    if isinstance(state, dict) and any(name.startswith(_OWN_PREFIX) for name in state):
        state = {k.removeprefix(_OWN_PREFIX): v for k, v in state.items() if k.startswith(_OWN_PREFIX)}
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        problem = "does not hold a state_dict of tensors."
        raise SettingError("checkpoint", str(path), problem, "Give a file with a model's state_dict.")
    return state


def save_weights(backbone: nn.Module, path: str | Path) -> None:
    """Write :func:`plain_weights` as safetensors (or, by another suffix, with ``torch.save``)."""
    state = {name: tensor.cpu().contiguous() for name, tensor in plain_weights(backbone).items()}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(state, path)
    else:
        torch.save(state, path)


def freeze(backbone: nn.Module, patterns: Sequence[str]) -> None:
    """Stop training the parameters whose names match a shell pattern; each must match one."""
    for pattern in patterns:
        matched = [p for name, p in backbone.named_parameters() if fnmatchcase(name, pattern)]
        if not matched:
            names = [name for name, _ in backbone.named_parameters()]
            close = difflib.get_close_matches(pattern, names, n=3) or names[:3]
            raise SettingError("freeze", pattern, "matches no parameter.", f"Write a pattern for names like {close}.")
        for parameter in matched:
            parameter.requires_grad_(False)


@torch.no_grad()
def example_images(backbone: nn.Module, channels: int, num_classes: int) -> Tensor:
    """Two images of noise that a timm model takes: of its own size where that is fixed, else as small as will do.

    Raises a :class:`SettingError` where the model does not return logits ``(2, num_classes)`` for them.
    """
    config = getattr(backbone, "pretrained_cfg", {})
    own = tuple(config.get("input_size", (3, 224, 224))[1:])
    built = getattr(getattr(backbone, "patch_embed", None), "img_size", None)
    sizes = [tuple(built)] if built else [own] if config.get("fixed_input_size", False) else [(64, 64), own]
    generator = torch.Generator().manual_seed(0)
    backbone.eval()
    for size in sizes:
        images = torch.randn(2, channels, *size, generator=generator)
        try:
            output = backbone(images)
            break
        except (RuntimeError, AssertionError) as error:  # kernels or windows larger than what is left of a small image
            refused = error
    else:
        problem = f"the model cannot read images of {size[0]} x {size[1]} ({str(refused).splitlines()[0][:80]})."
        raise SettingError("model_kwargs", size, problem, "Correct img_size and what depends on it.") from refused
    backbone.train()
    shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    if shape != (2, num_classes):
        problem = f"is what the model returns for two images; a classifier returns (2, {num_classes})."
        remedy = "Leave out what changes it in model_kwargs, such as global_pool."
        raise SettingError("model_kwargs", shape, problem, remedy)
    return images


def input_channels(backbone: nn.Module, model_kwargs: Mapping[str, Any]) -> int:
    """Channels of the images that a timm model was built for."""
    usual = getattr(backbone, "pretrained_cfg", {}).get("input_size", (3, 224, 224))[0]
    return int(model_kwargs.get("in_chans", usual))


def check_images(backbone: nn.Module, images: Any, expected: int) -> None:
    """Raise a :class:`SettingError` unless images are floats of a model's size with the ``expected`` channels."""
    if not isinstance(images, Tensor) or images.dim() != 4:
        given = f"images of {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        remedy = "Return a tensor of images from the data set or collate_fn."
        raise SettingError("data", given, "images must be a tensor (b, channels, height, width).", remedy)
    if not images.is_floating_point():
        raise SettingError("data", str(images.dtype), "images must be floats.", "Scale and normalise them first.")
    channels, size = images.shape[1], tuple(images.shape[2:])
    if channels != expected:
        problem, remedy = f"the images have {channels} channels.", f"Write in_chans: {channels}."
        raise SettingError("model_kwargs.in_chans", expected, problem, remedy)
    embed: Any = getattr(backbone, "patch_embed", None)
    fixed = getattr(embed, "img_size", None)
    if not getattr(backbone, "dynamic_img_size", False) and fixed is not None and size != tuple(fixed):
        problem = f"the images are {size[0]} x {size[1]}."
        remedy = f"Write img_size: {size[0] if size[0] == size[1] else list(size)}, or resize the images."
        raise SettingError("model_kwargs.img_size", tuple(fixed), problem, remedy)
