"""What a plan says of prompts, and what image and text passes cost at the size of ViT-B/32."""

import re
from pathlib import Path

import pytest
import torch

from flops_lightning.cli.command import main
from flops_lightning.datamodules import Caltech101DataModule
from flops_lightning.network.staging import flops
from flops_lightning.strategies import EvolutionStrategies
from flops_lightning.strategies.costs import site_costs
from flops_lightning.tasks import ClipPromptTuner

ROOT = Path(__file__).parents[2]
pytest.importorskip("open_clip", reason="prompts are for its models")


def test_a_plan_names_the_image_and_text_passes_of_a_step_and_of_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    main(["plan", "--config", "configs/clip_tiny_digits.yaml", "--seconds", "0.3", "--backprop", "false"])
    printed = capsys.readouterr().out
    rows = {row[0]: row[1] for row in re.findall(r"^([a-z_ ]+?) {2,}([\d,]+)", printed, flags=re.MULTILINE)}
    assert (rows["image_prompt"], rows["scores"]) == ("640", "20")
    # The last of 20 batches is smaller, and has as many text draws.
    assert rows["the whole run"] == f"{15 * (1257 * 10 + 20 * 20):,}"
    of_run = {row[0]: row[1] for row in re.findall(r"^(\w+) .* ([\d,]+)$", printed, flags=re.MULTILINE)}
    assert (of_run["image_prompt"], of_run["scores"]) == (f"{15 * 1257 * 10:,}", f"{15 * 20 * 20:,}")


@pytest.mark.slow
def test_a_text_pass_of_100_classes_costs_three_image_passes_in_vit_b32() -> None:
    names = [name for name in Caltech101DataModule.class_names if name != "Faces_easy"]
    task = ClipPromptTuner(
        model_name="ViT-B-32-quickgelu", class_names=[name.replace("_", " ") for name in names],
        text_prompt={"tokens": 12}, image_prompt={"tokens": 10}, strategy=EvolutionStrategies(seed=0),
    )  # fmt: skip
    image, text = task.strategy.sites
    assert {n: p.numel() for n, p in task.network.trainable().items()} == {"text_prompt.z": 500, "image_prompt.z": 500}
    images = torch.randn(1, 3, 224, 224)
    costs = site_costs(task.network, task.strategy.sites, images)
    assert costs.context[text.name] / costs.query[image.name] == pytest.approx(2.9, abs=0.1)
    with torch.no_grad(), task.network.evaluating(), task.network.frozen_parameters():
        patches = task.network.run(images, stop=1)
        counted, _ = flops(lambda x: task.network.run(x, 1, len(task.network) - 1), patches)
    assert counted / 1e9 == pytest.approx(10.3, abs=0.2)  # 60 tokens; the 50 of CLIP alone are 8.8
