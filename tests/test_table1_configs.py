"""The fourteen cells of the paper's Table 1: what their files say, on the real networks, and that each runs."""

import json
import os
import re
from itertools import product
from pathlib import Path

import pytest
import torch

from experiments.table1 import DATA_SETS, PAPER, published
from flops_lightning.allocators import GaussianAllocator
from flops_lightning.callbacks import QueryAllocatorCallback
from flops_lightning.cli.command import build, main
from flops_lightning.datamodules import Caltech101DataModule, CIFAR10DataModule, CIFAR100DataModule
from flops_lightning.strategies import LikelihoodRatio
from flops_lightning.strategies.costs import site_costs
from tests.datamodules.photo_folders import DISHES, WNIDS, photo, write, write_eurosat, write_flowers102

ROOT = Path(__file__).parent.parent
QUICK_CELLS = ("vit_base_cifar10", "vit_large_eurosat")
"""Cells that the normal run trains; the others are slow."""
CELLS = {
    path.stem: path for path in sorted((ROOT / "configs").glob("vit_*_*.yaml")) if path.stem.rpartition("_")[0] in PAPER
}
WIDTHS = {"vit_base": [1e-5, 1e-4, 1e-3], "vit_large": [5e-6, 1e-5, 1e-4, 1e-3]}
"""Appendix C.1 of the paper, group by group from the bottom."""
SIZES = {"vit_base": (12, 768, 12, 3072), "vit_large": (24, 1024, 16, 4096)}
"""Blocks, width, heads, inner width of the MLP."""
CLASSES = {"imagenet": len(WNIDS), "food101": len(DISHES), "flowers102": 102, "cifar10": 10, "eurosat": 10}
CLASSES |= {"caltech101": 101, "cifar100": 100}


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def repeat(folder: Path, label: int, number: int) -> None:
    write(folder / "0.jpg", photo(label, 0))
    for i in range(1, number):
        os.link(folder / "0.jpg", folder / f"{i}.jpg")


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("data")
    for label, name in enumerate(WNIDS):
        repeat(root / "imagenet" / "train" / name, label, 2501)
        repeat(root / "imagenet" / "val" / name, label, 1)
    for kind, names in (("cifar10", CIFAR10DataModule.class_names), ("cifar100", CIFAR100DataModule.class_names)):
        for label, name in enumerate(names):
            repeat(root / kind / "train" / name, label, 1000 // len(names) + 1)
            repeat(root / kind / "test" / name, label, 1)
    for label, name in enumerate(DISHES):
        repeat(root / "food-101" / "images" / name, label, 350)
    (root / "food-101" / "meta").mkdir()
    for part, numbers in (("train", range(1, 350)), ("test", range(1))):
        lists = {name: [f"{name}/{number}" for number in numbers] for name in DISHES}
        (root / "food-101" / "meta" / f"{part}.json").write_text(json.dumps(lists))
    for label, name in enumerate(Caltech101DataModule.class_names):
        repeat(Caltech101DataModule.source.folder(root) / name, label, 8)
    for make in (write_eurosat, write_flowers102):
        make(root)
    own = {"imagenet", "cifar10", "cifar100"}
    return {name: root / name if name in own else root for name in DATA_SETS}


def arguments(cell: str, roots: dict[str, Path]) -> list[str]:
    root = roots[cell.rpartition("_")[2]]
    return ["--config", str(CELLS[cell].relative_to(ROOT)), f"--data.init_args.root={root}"]


def test_there_is_a_file_for_every_cell() -> None:
    assert set(CELLS) == {f"{model}_{data_set}" for model, data_set in product(PAPER, DATA_SETS)}
    assert len(CELLS) == 14


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_has_the_papers_settings_on_the_real_network(cell: str, roots: dict[str, Path]) -> None:
    model, _, data_set = cell.rpartition("_")
    with torch.device("meta"):
        cli = build([*arguments(cell, roots), "--model.init_args.pretrained=false", "--trainer.logger=false"])
    task, data, trainer = cli.model, cli.datamodule, cli.trainer
    depth, width, heads, inner = SIZES[model]
    block = task.backbone.blocks[0]
    assert (len(task.backbone.blocks), task.backbone.embed_dim) == (depth, width)
    assert (block.attn.num_heads, block.mlp.fc1.out_features) == (heads, inner)
    assert task.backbone.patch_embed.img_size == (224, 224)
    assert task.backbone.head.out_features == CLASSES[data_set]

    strategy = task.strategy
    assert type(strategy) is LikelihoodRatio
    owners = [id(p) for site in strategy.sites for p in site.parameters.values()]
    assert sorted(owners) == sorted(id(p) for p in task.backbone.parameters())  # each by one site, none is left out
    assert not task.network.frozen()
    *groups, head = strategy.sites
    assert [site.sigma for site in groups] == WIDTHS[model]
    blocks = [{name.split(".")[1] for name in site.parameters if name.startswith("blocks.")} for site in groups]
    assert [len(each) for each in blocks] == [depth // len(groups)] * len(groups)
    assert set(head.parameters) == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert [site.queries_per_sample for site in strategy.sites] == [20] * len(strategy.sites)
    assert strategy.pilots.queries > 0

    assert (task.optimizer_settings.name, task.optimizer_settings.lr) == ("adam", 1e-4)
    assert trainer.max_epochs == 10
    assert trainer.precision == "32-true"
    assert (data.batch_size, data.image_size, data.normalization) == (128, 224, "backbone")
    allocators = [c.allocator for c in trainer.callbacks if isinstance(c, QueryAllocatorCallback)]
    assert [type(each) for each in allocators] == [GaussianAllocator]

    header = "".join(re.findall(r"^#.*\n", CELLS[cell].read_text(), flags=re.MULTILINE))
    for method in ("ops_lr", "lr", "ops_spsa", "bp"):
        assert f"{published(model, method, data_set):.1f}" in header
    costs = site_costs(task.network, strategy.sites, torch.empty(1, 3, 224, 224, device="meta"))
    passes = 1 + 20 * sum(costs.query.values()) + sum(costs.gradient.values())
    assert f"{passes:.0f} forward passes per sample and step" in header


@pytest.mark.filterwarnings("ignore:.*is below what torch.float32 resolves:RuntimeWarning")
@pytest.mark.parametrize(
    "cell", [cell if cell in QUICK_CELLS else pytest.param(cell, marks=pytest.mark.slow) for cell in CELLS]
)
def test_a_cell_runs_with_a_small_backbone(cell: str, roots: dict[str, Path], tmp_path: Path) -> None:
    size = {"pretrained": "false", "model_kwargs": "{patch_size: 56, embed_dim: 16, num_heads: 2}"}
    given = [f"--model.init_args.{name}={value}" for name, value in size.items()]
    given += [f"--data.init_args.{name}={value}" for name, value in {"num_workers": 0, "batch_size": 8}.items()]
    trial = ["--trainer.fast_dev_run=true", "--trainer.accelerator=cpu", f"--trainer.default_root_dir={tmp_path}"]
    main(["fit", *arguments(cell, roots), *given, *trial])
