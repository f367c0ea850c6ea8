"""What the noise of a step takes on a GPU, by count."""

from pathlib import Path

import pytest
import yaml

from benchmarks import noise_count
from benchmarks.noise_count import NoiseCount, StepNoise

ROOT = Path(__file__).parents[2]
STEP = StepNoise(activations=(5, 2), directions=(7, 3), batch=3, queries=4, rows=8)  # two chunks at each site


def test_counts_of_the_likelihood_ratio_by_hand():
    assert STEP.row_by_row(4) == NoiseCount(2 * (12 + 3 * 2), 12 * 7 * (8 + 4 + 12 + 4))
    assert STEP.by_kernels(2) == NoiseCount(2 * 2 * 2, 12 * 7 * 4 + (3 + 2) * 7 * 8)


def test_counts_of_pairs_by_hand():
    """Six pairs at each of two sites, drawn twice."""
    assert STEP.of_pairs(launches=6) == NoiseCount(24, 2 * 6 * 10 * 8)
    assert STEP.of_pairs(launches=STEP.chunks).launches == 8


def test_seconds_are_those_of_launches_and_bytes():
    assert NoiseCount(200_000, 335 * 10**10).seconds == pytest.approx(1 + 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "activations", "passes"),
    [
        ("ViT-Base/16", [197 * 768, 197 * 768, 768, 1000], 23),
        ("ViT-Large/16", [197 * 1024, 197 * 1024, 197 * 1024, 1024, 1000], 33),
    ],
)
def test_the_papers_networks_are_those_of_the_configurations(name, activations, passes):
    """Noise at the highest group moves the class token alone: nothing else is read."""
    model, groups = noise_count.NETWORKS[name]
    noise, found, flops = noise_count.setting(model, groups)
    assert noise.activations == activations
    assert round(found["LR"]) == passes
    text = (ROOT / "configs" / f"{'_'.join(model.split('_')[:2])}_imagenet.yaml").read_text()
    assert f"expect:    {passes} forward passes per sample and step" in text
    config = yaml.safe_load(text)
    sites = config["model"]["init_args"]["strategy"]["init_args"]["sites"]
    assert [site["queries_per_sample"] for site in sites] == [noise.queries] * len(activations)
    assert config["data"]["init_args"]["batch_size"] == noise.batch
    # 17.56 and 61.55 billion products; three quarters of the last block's are those of tokens that nothing reads.
    whole, blocks = {"ViT-Base/16": (35.1e9, 12), "ViT-Large/16": (123.1e9, 24)}[name]
    assert flops == pytest.approx(whole * (1 - 0.75 / blocks), rel=0.003)


def test_the_table_of_the_page_is_this_one():
    assert noise_count.report() in (ROOT / "docs" / "gpu.md").read_text()
