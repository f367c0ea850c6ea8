"""The tiny CLIP that the project ships, in a task, and CLIPs with random weights in folders of open_clip's form."""

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from flops_lightning.datamodules import DigitsDataModule
from flops_lightning.strategies import EvolutionStrategies
from flops_lightning.tasks import ClipPromptTuner
from flops_lightning.tasks.clip_model import CONFIG
from tests.reference.clip import TEXT, VISION

pytest.importorskip("open_clip", reason="prompts are for its models")

FOLDER = Path(__file__).parent.parent / "data" / "assets" / "clip_tiny_digits"
MODEL = {
    "model_name": f"local-dir:{FOLDER}", "class_names": DigitsDataModule.display_names,
    "template": DigitsDataModule.template,
}  # fmt: skip
TEXT_PROMPT = {"tokens": 4, "dim": 20, "queries": 3}
IMAGE_PROMPT = {"tokens": 2, "dim": 20, "queries": 4}
BOTH = {"text_prompt": TEXT_PROMPT, "image_prompt": IMAGE_PROMPT}


def tuner(**settings: Any) -> ClipPromptTuner:
    """The same whenever it is made; moved by evolution strategies."""
    pl.seed_everything(0, verbose=False)
    learns = {} if "search" in settings else {"strategy": EvolutionStrategies(seed=0), "optimizer": {"lr": 0.1}}
    return ClipPromptTuner(**{**MODEL, **learns, **(BOTH if settings.keys().isdisjoint(BOTH) else {}), **settings})


def random_clip(folder: Path, *, text: dict[str, Any] | None = None, **vision: Any) -> str:
    """The model name of a tiny CLIP with random weights."""
    folder.mkdir(exist_ok=True)
    config = {"embed_dim": 8, "vision_cfg": VISION | vision, "text_cfg": TEXT | (text or {})}
    (folder / CONFIG).write_text(json.dumps({"model_cfg": config}))
    return f"local-dir:{folder}"
