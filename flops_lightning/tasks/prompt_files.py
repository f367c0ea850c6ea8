"""Learned prompts outside of a task: which run a checkpoint is of, and a file that plain open_clip can use."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from flops_lightning.errors import SettingError

KEY = "clip_prompts"
"""Where a checkpoint says what its prompts belong to."""
REMEDY = "Give the settings of that run, or start a new run without the checkpoint."


def check_same_prompts(saved: Mapping[str, Any] | None, own: Mapping[str, Any]) -> None:
    """Raise a :class:`SettingError` if a checkpoint's prompts belong to other classes, texts, weights or another W.

    Both are what :attr:`ClipPromptTuner.identity` returns.
    """
    if saved is None:
        problem = "does not hold prompts of a ClipPromptTuner."
        raise SettingError("ckpt_path", KEY, problem, "Give a checkpoint of such a run.")
    then, now = saved["class_names"], own["class_names"]
    if then != now:
        differing = [(a, b) for a, b in zip(then, now, strict=False) if a != b]
        before, here = differing[0] if differing else (f"{len(then)} names", f"{len(now)} names")
        problem = f"the checkpoint's prompts were learned with {before!r} instead, the first difference."
        raise SettingError("class_names", here, problem, REMEDY)
    for name in ("template", "ensemble", "model_name"):
        if saved[name] != own[name]:
            raise SettingError(name, own[name], f"the checkpoint's run has {saved[name]!r}.", REMEDY)
    if saved["weights"] != own["weights"]:
        problem = "are not the weights with which the checkpoint's prompts were learned."
        raise SettingError("checkpoint", own["weights"][:12], problem, REMEDY)
    for prompt in ("text_prompt", "image_prompt"):
        before, here = saved[prompt], own[prompt]
        if bool(before) != bool(here):
            there = "has" if before else "does not have"
            raise SettingError(prompt, here or None, f"the checkpoint's run {there} one.", REMEDY)
        for name in here:
            if before.get(name) != here[name]:
                problem = f"the checkpoint's run has {before.get(name)!r}."
                raise SettingError(f"{prompt}.{name}", here[name], problem, REMEDY)


def write_prompts(path: str | Path, prompts: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write tokens ``(n, w)`` by name as safetensors, with texts and lists, these as JSON, as its metadata."""
    from safetensors.torch import save_file

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {name: value if isinstance(value, str) else json.dumps(value) for name, value in about.items()}
    save_file({name: tokens.detach().cpu().contiguous() for name, tokens in prompts.items()}, path, metadata)


def of_clip(name: str) -> bool:
    """Whether a tensor of the task's state is one of the frozen model."""
    return name.startswith("clip.") and not name.startswith(("clip.text_prompt.", "clip.image_prompt."))
