"""Every configuration runs, and the pages link to what exists."""

import inspect
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer

from flops_lightning.cli.command import build, main
from tests.cifar10 import noise_images, weights_argument

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml"))
METHODS = [path for path in CONFIGS if path.startswith("configs/method/")]
OVERLAYS = [path for path in CONFIGS if path.startswith(("configs/digits/", "configs/allocators/", "configs/targets/"))]
ELSEWHERE = re.compile(r"configs/((clip|vit_(base|large))_\w+\.yaml|(alignment|eval|lm|prompt_method|small)/.*)")
"""Configurations that other tests run."""
HARDWARE = [path for path in CONFIGS if path.startswith("configs/hardware/")]
RUN_HERE = [path for path in CONFIGS if path not in (*METHODS, *HARDWARE) and not ELSEWHERE.fullmatch(path)]
QUICKSTART = "configs/vit_tiny_digits.yaml"
CIFAR10 = "configs/vit_micro_cifar10.yaml"
IMAGE_FOLDER = "configs/image_folder.yaml"


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def run(configs: list[str], folder: Path, *extra: str) -> dict[str, Any]:
    files = [part for path in configs for part in ("--config", path)]
    main(["fit", *files, "--trainer.default_root_dir", str(folder), "--trainer.enable_progress_bar=false", *extra])
    (summary,) = folder.rglob("summary.json")
    return json.loads(summary.read_text())


def test_there_are_configurations() -> None:
    assert {QUICKSTART, CIFAR10, "configs/vit_tiny_digits_upright.yaml"} < set(CONFIGS)
    assert len(OVERLAYS) == 17
    assert {Path(path).stem for path in METHODS} == set(STRATEGIES)


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings that give CIFAR-10's configuration images of noise, and weights of a network with another head."""
    root = tmp_path_factory.mktemp("cifar10")
    noise_images(root, train=14, test=2)
    data = {"root": root, "images_per_class": 0, "val_images": 10, "test_images": 0}
    given = [f"--data.init_args.{name}={value}" for name, value in data.items()]
    return [weights_argument(root), *given]


@pytest.mark.parametrize(
    "path", [each if each == QUICKSTART else pytest.param(each, marks=pytest.mark.slow) for each in RUN_HERE]
)
def test_every_configuration_runs(path: str, tmp_path: Path, cifar10: list[str]) -> None:
    if path.endswith("lora.yaml"):
        pytest.importorskip("peft")
    configs = [QUICKSTART, path] if path in OVERLAYS else [path]
    own_images = [  # those of CIFAR-10's class folders, in as large a training part as the others have
        "--model.init_args.pretrained=false", f"--data.init_args.root={Path(cifar10[0].partition('=')[2]).parent}",
        "--data.init_args.val_share=0.08", "--data.init_args.num_workers=0",
        '--model.init_args.model_kwargs={"img_size": 32, "embed_dim": 16, "num_heads": 2}',
    ]  # fmt: skip
    extra = {CIFAR10: cifar10, IMAGE_FOLDER: own_images}.get(path, [])
    limits = ("--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1", "--trainer.max_epochs=1")
    summary = run(configs, tmp_path, *limits, *extra)
    assert summary["lost_queries"] == 0
    assert 0 <= summary["test_accuracy"] <= 1
    backprop = "backprop" in path or "upright" in path
    assert summary["strategy"] == ("Backprop" if backprop else "LikelihoodRatio")
    assert summary["queries"] == pytest.approx((not backprop) * summary["queries_per_sample"] * 2 * 64, abs=0.1)


@pytest.mark.parametrize("path", HARDWARE)
def test_a_hardware_overlay_changes_nothing_but_the_machine(path: str, tmp_path: Path) -> None:
    content = yaml.safe_load(Path(path).read_text())
    assert set(content) == {"trainer"}
    assert set(content["trainer"]) <= {"accelerator", "devices", "num_nodes", "strategy", "precision"}
    assert set(content["trainer"]) <= set(inspect.signature(Trainer).parameters)
    if content["trainer"]["accelerator"] == "cpu":
        summary = run([QUICKSTART, path], tmp_path, "--trainer.max_steps=1", "--trainer.limit_val_batches=0")
        assert summary["steps"] == 1
    else:
        assert 128 % (content["trainer"]["devices"] * content["trainer"]["num_nodes"]) == 0


STRATEGIES = {
    "bp": ("Backprop", "none", 0),
    "lr": ("LikelihoodRatio", "EqualAllocator", 20),
    "ops_lr": ("LikelihoodRatio", "OptimalAllocator", 20),
    "lr_muon": ("LikelihoodRatio", "EqualAllocator", 20),
    "es": ("EvolutionStrategies", "EqualAllocator", 20),
    "spsa": ("SPSA", "EqualAllocator", 20),
    "ops_spsa": ("SPSA", "OptimalAllocator", 20),
    "spsa_guided": ("SPSA", "EqualAllocator", 20),
    "spsa_flipout": ("SPSA", "EqualAllocator", 20),
    "grzo": ("SPSA", "EqualAllocator", 20),
    "zo_muon": ("EvolutionStrategies", "EqualAllocator", 20),
    "mezo": ("MeZO", "none", 2),
    "mezo_nspsa": ("MeZO", "none", 80),
    "deepzero_spsa": ("SPSA", "EqualAllocator", 20),
    "deepzero_cge": ("CoordinateFiniteDifferences", "none", 80),
    "forward_mode": ("ForwardMode", "EqualAllocator", 20),
}
"""Of each method overlay: strategy, allocator, and queries of a sample and step, at each site where there are some."""
BASES = {QUICKSTART: {"lower", "middle", "top", "head"}, CIFAR10: {"block4", "block5", "head"}}
"""Configurations that the methods are put on, with their sites."""
SMALL = ("--data.init_args.batch_size=4", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=0")


@pytest.mark.filterwarnings("ignore:.*has no effect. derivatives are exact:UserWarning")
@pytest.mark.parametrize(
    ("method", "base"),
    [
        *(
            (method, QUICKSTART) if method == "ops_lr" else pytest.param(method, QUICKSTART, marks=pytest.mark.slow)
            for method in STRATEGIES
        ),
        pytest.param("ops_spsa", CIFAR10, marks=pytest.mark.slow),
    ],
)
def test_every_method_runs(method: str, base: str, tmp_path: Path, cifar10: list[str]) -> None:
    grasp = ("--model.init_args.strategy.init_args.grasp_queries=3",) if method == "deepzero_cge" else ()
    extra = (*SMALL, *grasp, *(cifar10 if base == CIFAR10 else ()))
    summary = run([base, f"configs/method/{method}.yaml"], tmp_path, "--trainer.max_epochs=1", *extra)
    strategy, allocator, queries = STRATEGIES[method]
    assert (summary["strategy"], summary["allocator"]) == (strategy, allocator)
    assert (summary["samples"], summary["lost_queries"]) == (2 * 4, 0)
    if allocator == "none":
        once = {"zo_grasp": (2 * 3 + 1) * 4} if method == "deepzero_cge" else {}
        name = {"MeZO": "all", "CoordinateFiniteDifferences": "coordinates", "Backprop": ""}[strategy]
        assert summary["queries_by_site"] == ({name: queries * 2 * 4, **once} if name else {})
    else:  # all of the configuration's sites, each with its queries, and no pilots
        assert summary["queries_by_site"] == dict.fromkeys(BASES[base], queries * 2 * 4)


ONE_OF_EACH = ("bp", "ops_lr", "grzo", "mezo", "deepzero_cge", "forward_mode")
"""Methods that are put on the second configuration: one of each kind of strategy."""


@pytest.mark.filterwarnings("ignore:.*has no effect. derivatives are exact:UserWarning")
@pytest.mark.parametrize(
    ("method", "base"), [*((method, QUICKSTART) for method in STRATEGIES), *((kind, CIFAR10) for kind in ONE_OF_EACH)]
)
def test_a_method_takes_its_own_settings_and_the_sites_only(method: str, base: str, cifar10: list[str]) -> None:
    path = f"configs/method/{method}.yaml"
    cli = build(["--config", base, "--config", path, *(cifar10 if base == CIFAR10 else ())])
    inherited, strategy = (yaml.safe_load(Path(p).read_text())["model"]["init_args"]["strategy"] for p in (base, path))
    inherited, own = inherited["init_args"], strategy.get("init_args", {})
    parsed = cli.config["model"]["init_args"]["strategy"]
    assert parsed["class_path"] == strategy["class_path"]
    parser = ArgumentParser()
    parser.add_class_arguments(type(cli.model.strategy))
    known = parser.get_defaults().as_dict()
    given = parsed["init_args"].as_dict() if "init_args" in parsed else {}
    assert own.keys() <= given.keys()
    for name, value in given.items():
        if name == "pilots":
            assert value["queries"] == 0
        elif name == "sites":
            assert [site["name"] for site in value] == [site["name"] for site in inherited["sites"]]
        else:
            assert value == own.get(name, inherited.get(name, known[name])), name
    left_out = inherited.keys() - given.keys()
    assert left_out <= ({"sites", "pilots"} if "sites" not in known else set()) | (inherited.keys() - known.keys())
    widths = {site.sigma for site in cli.model.strategy.sites}
    expected = {"ForwardMode": {0.0}, "LikelihoodRatio": {0.03}}.get(STRATEGIES[method][0], {1e-3})
    assert widths <= expected


def test_every_configuration_opens_with_what_it_is_and_how_to_launch_it() -> None:
    for path in CONFIGS:
        header = re.match(r"(#.*\n)+", Path(path).read_text())
        assert header is not None, path
        assert "launch:" in header[0], path
        launched = re.findall(r"--config (\S+)", header[0])
        assert launched[-1] == path, path


@pytest.mark.parametrize("page", [Path("README.md"), *sorted(Path("docs").glob("*.md"))], ids=str)
def test_a_page_links_to_what_exists(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_the_readme_snippet_fills_gradients() -> None:
    blocks = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), flags=re.DOTALL)
    (snippet,) = [block for block in blocks if "stage_network" in block]
    torch.manual_seed(0)
    layers = [torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Tanh()) for _ in range(4)]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(6, 3))
    names = {
        "model": model,
        "loss": lambda outputs, targets: torch.nn.functional.cross_entropy(outputs, targets, reduction="none"),
        "inputs": torch.randn(8, 6),
        "targets": torch.randint(3, (8,)),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
    }
    exec(snippet, names)
    norms = [float(p.grad.norm()) for p in model.parameters()]
    assert min(norms) > 0


def test_the_quickstart_is_the_papers_setting_with_few_queries_and_muon() -> None:
    def settings(*configs: str) -> Any:
        loaded = build([part for path in configs for part in ("--config", path)]).config.as_dict()
        del loaded["config"]
        return loaded

    few, paper = settings("configs/quickstart.yaml"), settings(QUICKSTART, "configs/allocators/few_queries.yaml")
    models = few["model"]["init_args"], paper["model"]["init_args"]
    few_optimizer, paper_optimizer = (model["optimizer"] for model in models)
    assert few_optimizer == {**paper_optimizer, "name": "muon", "lr": few_optimizer["lr"]}
    del models[0]["optimizer"], models[1]["optimizer"]
    pilots = [model["strategy"]["init_args"].pop("pilots") for model in models]
    assert [(each or {"queries": 0})["queries"] for each in pilots] == [0, 0]
    assert few == paper


@pytest.mark.slow
def test_the_quickstart_reaches_what_the_readme_promises(tmp_path: Path) -> None:
    before = time.process_time()
    summary = run(["configs/quickstart.yaml"], tmp_path)
    assert time.process_time() - before < 180  # of the processor: time on the wall tells how busy the machine is
    assert summary["start_accuracy"] <= 0.4
    assert summary["test_accuracy"] >= 0.92  # seeds 0, 1 and 2: 96.7, 95.8, 95.6 %
    assert summary["queries"] < 110_000  # a tenth of the paper's 20 for every sample and site is 121 thousand


def test_no_figure_is_left_open_in_the_documentation() -> None:
    for path in (*Path("docs").glob("*.md"), Path("README.md"), Path("data/README.md")):
        assert "@@" not in path.read_text(), path
