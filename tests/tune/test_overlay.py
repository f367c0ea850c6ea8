import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from flops_lightning.cli.command import build, main
from flops_lightning.network.staging import stage_network
from flops_lightning.objectives import cross_entropy
from flops_lightning.strategies import SPSA, EvolutionStrategies, LikelihoodRatio, MeZO, SiteSpec
from flops_lightning.tune.overlay import strategy_settings
from tests.digits import TINY

SITE = "flops_lightning.strategies.LikelihoodRatio"
SETTINGS = {
    "seed_everything": 3,
    "trainer": {"max_epochs": 1, "accelerator": "cpu", "devices": 1},
    "model": {
        "class_path": "flops_lightning.tasks.ForwardImageClassifier",
        "init_args": {
            "model_name": "vit_tiny_patch16_224",
            "model_kwargs": TINY,
            "optimizer": {"name": "sgd", "lr": 0.001, "schedule": "cosine", "warmup_steps": 2},
            "strategy": {"class_path": SITE, "init_args": {"variant": "antithetic"}},
        },
    },
    "data": {"class_path": "flops_lightning.datamodules.DigitsDataModule", "init_args": {"batch_size": 16}},
}
FEW = ["--rates", "3", "--steps", "8", "--widths", "3", "--batches", "1"]
QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]


@pytest.fixture(autouse=True)
def given(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "given.yaml"
    file.write_text(yaml.safe_dump(SETTINGS))
    return file


@pytest.mark.slow
def test_fit_takes_the_overlay_that_tune_writes(capsys):
    main(["tune", "--config", "given.yaml", *QUIET, *FEW])
    said, written = capsys.readouterr().out, Path("tuned.yaml").read_text()
    found = {name: float(s) for name, s in re.findall(r"^# +(\w+): sigma (\S+) instead of 0.01;", written, re.M)}
    assert list(found) == ["group1", "group2", "group3", "head"]
    comment = written.split("model:\n")[0]
    assert "made by:  python main.py tune --config given.yaml" in comment
    assert "LikelihoodRatio, noise from seed 3" in comment
    assert "written to tuned.yaml: add --config tuned.yaml to fit" in said
    assert ("plot: tuned.png" in said) == Path("tuned.png").exists()
    rate = float(re.search(r"learning rate: (\S+) instead of 0.001", said)[1])
    assert all(f"{sigma:.2g}" in said for sigma in found.values())

    cli = build(["--config", "given.yaml", "--config", "tuned.yaml", *QUIET])
    assert cli.model.strategy.sigmas == found
    assert cli.model.strategy.variant == "antithetic"
    own = cli.model.optimizer_settings
    assert (own.name, own.lr, own.schedule, own.warmup_steps) == ("sgd", rate, "cosine", 2)
    main(["fit", "--config", "given.yaml", "--config", "tuned.yaml", *QUIET, "--trainer.max_steps", "1"])
    assert Path("runs/given+tuned/version_0/config.yaml").exists()


def test_tune_writes_nothing_but_the_overlay_and_its_picture(capsys):
    main(["tune", "--config", "given.yaml", *QUIET, *FEW, "--rates", "0", "--output", "deep/er/own.yaml"])
    assert {str(file) for file in Path().rglob("*.*")} <= {"given.yaml", "deep/er/own.yaml", "deep/er/own.png"}
    assert "optimizer" not in yaml.safe_load(Path("deep/er/own.yaml").read_text())["model"]["init_args"]
    assert "learning rate" not in capsys.readouterr().out


def test_without_matplotlib_there_is_an_overlay_and_no_plot(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    main(["tune", "--config", "given.yaml", *QUIET, *FEW, "--rates", "0"])
    said = capsys.readouterr().out
    assert "no plot: plot = 'tuned.png': needs the package matplotlib" in said
    assert said.endswith('Run pip install -e ".[plots]" in the checkout.\n')
    assert Path("tuned.yaml").exists()
    assert not Path("tuned.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "given.yaml"], "output = 'given.yaml': is there already. Give another --output, or --overwrite"),
        (["--output", "tuned.txt"], "output = 'tuned.txt': is not the name of a YAML file."),
        (["--ckpt_path", "a.ckpt"], "ckpt_path = 'a.ckpt': settings are tried from the start of a run. Leave it out"),
        (["--rate", "8"], "--rate is not a setting. Did you mean `rates`?"),
    ],
)
def test_mistakes_are_found_before_anything_is_tried(refused, arguments, message):
    assert refused("tune", "--config", "given.yaml", *arguments).startswith(message)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 3))


ROUND_TRIPS = {
    "default sites": (LikelihoodRatio, {}),
    "blocks": (LikelihoodRatio, {"sites": [SiteSpec(["0", "3"], kind="block", name="b"), SiteSpec(["4"])]}),
    "modules": (
        LikelihoodRatio,
        {"sites": [SiteSpec(modules=["[03]", "2"], kind="block"), SiteSpec(modules=["[4]"], queries_per_sample=2)]},
    ),
    "linear": (LikelihoodRatio, {"sites": [SiteSpec(["0", "4"], kind="linear", queries_per_sample=4)]}),
    "linear by modules alone": (LikelihoodRatio, {"sites": [SiteSpec(modules=["?"], kind="linear")]}),
    "linear, together": (
        LikelihoodRatio,
        {"sites": [SiteSpec(["0", "2"], kind="linear", together=True), SiteSpec(["3", "4"], kind="linear")]},
    ),
    "exact head": (
        LikelihoodRatio, {"exact_head": True, "sites": [SiteSpec(["0", "1"]), SiteSpec(["2", "3"]), SiteSpec(["4"])]},
    ),
    "one sigma for all": (SPSA, {"sigma": 1e-3, "sites": [SiteSpec(["0", "1"]), SiteSpec(["2", "4"])]}),
    "parameters, default sites": (EvolutionStrategies, {"sigma": 1e-3}),
    "MeZO": (MeZO, {"sigma": 0.5}),
}  # fmt: skip


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_the_settings_written_make_the_same_sites_with_the_widths_found(name):
    kind, settings = ROUND_TRIPS[name]
    first = kind(**settings, seed=0)
    first.bind(stage_network(network()), cross_entropy)
    wanted = {site: 0.1 * (i + 1) for i, site in enumerate(first.sigmas)}
    written = yaml.safe_load(yaml.safe_dump(strategy_settings(first, wanted)))
    again = kind(**{**settings, **written}, seed=0)
    again.bind(stage_network(network()), cross_entropy)
    assert again.sigmas == pytest.approx(wanted)
    for a, b in zip((*first.sites, *first.exact_sites), (*again.sites, *again.exact_sites), strict=True):
        same = ("name", "first", "last", "queries_per_sample", "tokens", "in_parameters")
        assert [getattr(a, each) for each in same] == [getattr(b, each) for each in same]
        assert [each.name for each in a.layers] == [each.name for each in b.layers]
        assert list(a.parameters) == list(b.parameters)
