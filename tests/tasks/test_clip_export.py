"""The exported prompts in plain open_clip, by the lines that the documentation gives."""

import json
import re
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import normalize

from flops_lightning.strategies import EvolutionStrategies
from flops_lightning.tasks import ClipPromptTuner
from flops_lightning.tasks.clip_model import load_clip
from tests.clip_digits import MODEL, TEXT_PROMPT, random_clip, tuner

PAGE = Path(__file__).parent.parent.parent / "docs" / "prompts.md"


def lines() -> str:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    (found,) = [block for block in blocks if "safe_open" in block]
    return found


@pytest.mark.parametrize("name", ["digits", "random"])
@torch.no_grad()
def test_plain_open_clip_gives_the_tasks_logits_from_the_file(name: str, tmp_path: Path) -> None:
    if name == "digits":
        task, tokenizer = tuner(), load_clip(MODEL["model_name"], "")[1]
    else:  # CLIP's whole vocabulary and its own tokenizer
        model = {"model_name": random_clip(tmp_path / "clip"), "class_names": ["dog", "hot air balloon"]}
        prompts = {"text_prompt": {"tokens": 7, "dim": 20}, "image_prompt": {"tokens": 3, "dim": 20}}
        task, tokenizer = ClipPromptTuner(**model, **prompts, strategy=EvolutionStrategies(seed=0)), open_clip.tokenize
    images = torch.randn(5, 3, 8, 8)
    task.start_image_prompt(images)
    for prompt in (task.clip.text_prompt, task.clip.image_prompt):
        nn.init.normal_(prompt.z)
    task.export_prompt(tmp_path / "prompts.safetensors")
    plain: Any = open_clip.create_model(task.hparams["model_name"]).eval()
    own = {n.removeprefix("visual."): p for n, p in task.clip.named_parameters() if n.startswith("visual.")}
    plain.visual.load_state_dict(own)  # those of random weights
    for part in ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection"):
        setattr(plain, part, getattr(task.clip.texts, part))
    names = {
        "path": tmp_path / "prompts.safetensors", "clip": plain, "tokenizer": tokenizer, "images": images,
        "json": json, "torch": torch, "safe_open": safe_open, "load_file": load_file, "normalize": normalize,
    }  # fmt: skip
    exec(lines(), names)
    torch.testing.assert_close(names["logits"], task.eval()(images), rtol=1e-4, atol=1e-4)


def test_the_file_names_the_model_and_holds_the_prompt_that_there_is(tmp_path: Path) -> None:
    task = tuner(text_prompt=TEXT_PROMPT)
    task.export_prompt(tmp_path / "new" / "prompts.safetensors")
    assert load_file(tmp_path / "new" / "prompts.safetensors").keys() == {"text_prompt"}
    about = safe_open(tmp_path / "new" / "prompts.safetensors", "pt").metadata()
    assert json.loads(about["class_names"]) == list(MODEL["class_names"])
    assert {name: about[name] for name in ("template", "model_name", "checkpoint")} == {
        "template": MODEL["template"], "model_name": MODEL["model_name"], "checkpoint": "",
    }  # fmt: skip
