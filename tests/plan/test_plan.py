import re
import tempfile
from collections import Counter
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from flops_lightning.allocators import EqualAllocator, GaussianAllocator
from flops_lightning.callbacks import QueryAllocatorCallback
from flops_lightning.cli.command import main
from flops_lightning.datamodules import DigitsDataModule
from flops_lightning.datamodules.loading import GlobalBatches
from flops_lightning.errors import SettingError
from flops_lightning.network.memory import held, restart_peak
from flops_lightning.plan.cost import Cost, Epoch, typical_seconds
from flops_lightning.plan.gradient_noise import STEPS, GradientNoise
from flops_lightning.plan.plan import Plan, make_plan, text
from flops_lightning.plan.stopwatch import StepMemory, lasting_bytes
from flops_lightning.strategies import SPSA, Backprop, CoordinateFiniteDifferences, LikelihoodRatio, MeZO, SiteSpec
from flops_lightning.strategies.costs import site_costs
from flops_lightning.tasks import ForwardImageClassifier
from tests.digits import MODEL, QUIET, TINY, quiet_trainer

REPOSITORY = Path(__file__).parents[2]
SITES = [
    SiteSpec(["embed", "blocks.0"], queries_per_sample=4),
    SiteSpec(["blocks.1"], queries_per_sample=6, name="top"),
    SiteSpec(["pool", "head"], queries_per_sample=2),
]
LEAN = {name: value for name, value in QUIET.items() if name != "devices"}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))


def task(strategy, kind=ForwardImageClassifier, **settings) -> ForwardImageClassifier:
    if isinstance(strategy, CoordinateFiniteDifferences):  # elsewhere what a step costs is a matter of its mask
        settings["freeze"] = ["cls_token", "pos_embed", "patch_embed.*", "blocks.*", "norm.*"]
    return kind(**{**MODEL, "model_kwargs": {**TINY, "depth": 2}}, strategy=strategy, **settings)


def allocation(strategy: str) -> list[QueryAllocatorCallback]:
    return {
        "pilots": [QueryAllocatorCallback(allocator=GaussianAllocator(traces={"source": "pilots"}))],
        "equal": [QueryAllocatorCallback(allocator=EqualAllocator())],
    }.get(strategy, [])


STRATEGIES = {
    "likelihood ratio": lambda: LikelihoodRatio(sites=SITES, seed=0),
    "pilots": lambda: LikelihoodRatio(sites=SITES, pilots={"sites": "top", "queries": 4}, seed=0),
    "site by site": lambda: LikelihoodRatio(sites=SITES, update="site_by_site", seed=0),
    "equal": lambda: SPSA(sites=SITES, seed=0),
    "mezo": lambda: MeZO(seed=0),
    "coordinates": lambda: CoordinateFiniteDifferences(coordinates=5, grasp_queries=4, seed=0),
    "backprop": Backprop,
}


def planned(method="likelihood ratio", batch_size=500, **settings) -> Plan:
    """A plan measured in a blink: by a clock that moves by itself, after each of a few steps."""
    given = {**LEAN, "callbacks": allocation(method), "max_epochs": 1, **settings}
    made, data, clock = task(STRATEGIES[method]()), DigitsDataModule(batch_size=batch_size), map(float, count())
    return make_plan(made, data, given, seconds=1, backprop=False, clock=clock.__next__)


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_steps_queries_and_compute_are_those_that_a_fit_counts(strategy):
    plan = planned(strategy, max_epochs=2)
    run = task(STRATEGIES[strategy]())
    trainer = quiet_trainer(*allocation(strategy), max_epochs=2, limit_val_batches=0)
    trainer.fit(run, datamodule=DigitsDataModule(batch_size=500))
    spent = run.strategy.meter.total()
    assert plan.steps == trainer.global_step == 6  # batches of 500, 500 and 257, twice
    assert plan.samples == 2 * 1257
    assert plan.queries == spent.queries
    assert plan.forward_equivalents == pytest.approx(spent.forward_equivalents, rel=1e-9)
    by_site = {site.name: site.queries * plan.samples for site in plan.own.sites}
    once = plan.own.cost.queries_once
    assert (once > 0) == (strategy == "coordinates")
    assert sum(by_site.values()) + once == pytest.approx(spent.queries)
    for name, counted in run.strategy.meter.sites.items():
        if counted.queries and not once:
            assert by_site[name] == pytest.approx(counted.queries)


def test_a_step_is_split_by_site_with_what_a_query_costs_there():
    plan = planned(batch_size=64, limit_train_batches=3)
    bound = task(STRATEGIES["likelihood ratio"]())
    costs = site_costs(bound.network, bound.strategy.sites, torch.zeros(1, 1, 8, 8))
    clean, *sites = plan.own.sites
    assert (clean.name, clean.queries, clean.query_cost, clean.forward_equivalents) == ("clean", 0, None, 1)
    assert {site.name: site.queries for site in sites} == {"embed..blocks.0": 4, "top": 6, "pool..head": 2}
    for site in sites:
        assert site.query_cost == pytest.approx(costs.query[site.name])
        whole = site.queries * costs.query[site.name] + costs.gradient[site.name]
        assert site.forward_equivalents == pytest.approx(whole)
    assert plan.own.cost.forward_equivalents == pytest.approx(sum(site.forward_equivalents for site in plan.own.sites))


@pytest.mark.parametrize(
    "settings",
    [
        {"max_epochs": 3},
        {"max_epochs": 5, "check_val_every_n_epoch": 2},
        {"max_epochs": 2, "val_check_interval": 0.5},
        {"max_epochs": 2, "val_check_interval": 2},
        {"max_steps": 7, "max_epochs": -1},
        {"max_steps": 7, "max_epochs": 2, "limit_train_batches": 3},
        {"max_steps": 7, "val_check_interval": 3, "check_val_every_n_epoch": None},
        {"max_epochs": 2, "limit_train_batches": 0.6, "limit_val_batches": 1},
        {"max_epochs": 2, "limit_val_batches": 0},
        {"max_epochs": 5, "max_steps": 100, "overfit_batches": 2},
        {"fast_dev_run": 2},
    ],
)
def test_steps_and_validations_are_those_of_the_trainer(settings):
    seen = Counter()

    class Counting(Callback):
        def on_train_batch_end(self, *_):
            seen["steps"] += 1

        def on_validation_batch_end(self, *_):
            seen["batches"] += 1

        def on_validation_epoch_end(self, *_):
            seen["validations"] += 1

    quiet_trainer(Counting(), **{"max_epochs": None, "num_sanity_val_steps": 0, **settings}).fit(
        task(Backprop()), datamodule=DigitsDataModule(batch_size=300)
    )
    plan = planned("backprop", batch_size=300, **{"max_epochs": None, **settings})
    assert plan.steps == seen["steps"]
    assert plan.validations == seen["validations"]
    assert plan.validations * plan.own.validation_batches == seen["batches"]


@pytest.mark.slow
def test_a_run_of_one_step_is_its_own_measurement_and_of_one_without_an_end_the_whole_is_unknown():
    plan = planned(max_steps=1, max_epochs=-1)
    assert plan.queries == 500 * 12
    assert plan.own.cost.seconds == plan.own.cost.seconds_once
    assert Cost.of({"queries": [6.0], "forward_equivalents": [3.0]}, [3], seconds=1, seconds_once=1).queries == 2
    spent = [1000.0 + 160.0 * (i + 1) for i in range(4)]  # 1000 once, and 80 per sample
    curves = {"queries": spent, "forward_equivalents": [q / 4 for q in spent]}
    assert Cost.of(curves, [2] * 4, seconds=0.5, seconds_once=3.0) == Cost(80.0, 20.0, 1000.0, 250.0, 0.5, 3.0)
    plan = planned(max_epochs=-1)
    assert (plan.steps, plan.samples, plan.queries, plan.forward_equivalents) == (None,) * 4
    assert plan.seconds(plan.own) is None
    assert "3 an epoch, unknown in all" in text(plan)
    assert re.search(r"the whole fit +unknown", text(plan))


@pytest.mark.parametrize(
    ("samples", "batches", "limits", "steps"),
    [
        (1257, 20, {"max_epochs": -1, "max_steps": 9, "accumulate": 3}, 20 + 2 * 3),  # 7 in an epoch, the last of two
        (1257, 20, {"max_epochs": 1, "max_steps": 9, "accumulate": 3}, 20),
        (None, float("inf"), {"max_epochs": 4, "max_steps": -1}, None),
        (None, float("inf"), {"max_epochs": 4, "max_steps": 30}, 30),
    ],
)
def test_steps_follow_from_the_limits(samples, batches, limits, steps):
    assert Epoch.of(samples, 64, batches).steps_until(**limits) == steps


def test_an_epoch_without_end_is_counted_in_steps():
    epoch = Epoch.of(None, 8, float("inf"))
    assert epoch.samples_of(30) == 240
    assert epoch.validations(30, every_epochs=1, interval=1.0) == 0
    assert epoch.validations(30, every_epochs=None, interval=7) == 4


@pytest.mark.parametrize(
    ("samples", "batch_size", "processes"), [(1257, 157, 2), (1256, 157, 8), (100, 5, 4), (99, 5, 4)]
)
def test_a_rest_too_small_for_all_processes_is_no_batch(samples, batch_size, processes):
    seen = GlobalBatches(range(samples), batch_size=batch_size * processes, world_size=processes, rank=0, seed=0)
    steps = -(-len(seen) // batch_size)
    assert Epoch.of(samples, batch_size, float("inf"), processes=processes).steps == steps


def test_of_several_processes_one_is_measured_with_its_share(monkeypatch):
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a process was launched"))
    monkeypatch.setattr("multiprocessing.Process.start", lambda *_: pytest.fail("a process was launched"))
    plan = planned(batch_size=64, devices=2, strategy="ddp", max_epochs=2)
    assert not torch.distributed.is_initialized()
    assert plan.processes == 2
    assert plan.own.epoch == Epoch(samples=629, batch_size=32, steps=20)
    assert plan.steps == 40
    assert plan.queries == 2 * 629 * 12
    assert plan.own.validation_batches == 3  # 180 images, half of them in batches of 32
    assert "those of one of 2 processes" in text(plan)
    with pytest.raises(SettingError, match="cannot be divided evenly between 2 processes"):
        planned(batch_size=33, devices=2, strategy="ddp")
    with pytest.raises(SettingError, match="has no effect under manual optimisation"):
        planned(devices=2, strategy="ddp", gradient_clip_val=1.0)


def test_the_time_of_the_whole_follows_from_that_of_its_parts():
    clock = SimpleNamespace(now=0.0)

    class Timed(ForwardImageClassifier):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            first = self.trainer.global_step == 1
            clock.now += 4.0 if first else 0.5

        def on_train_epoch_start(self):
            clock.now += 2.0 if self.current_epoch else 0.0

        def validation_step(self, batch, batch_idx):
            clock.now += 0.25

    made, data = task(Backprop(), Timed), DigitsDataModule(batch_size=100)  # 13 steps an epoch
    plan = make_plan(made, data, {**LEAN, "max_epochs": 100}, seconds=20, clock=lambda: clock.now)
    assert plan.own.cost.seconds == 0.5
    assert plan.own.epoch_seconds == 2.0
    assert (plan.own.validation_batches, plan.own.validation_seconds) == (2, 0.25)
    start = 2 * 0.25  # validation beforehand
    assert plan.seconds(plan.own) == start + 4.0 + (1300 - 1) * 0.5 + 99 * 2.0 + 100 * 2 * 0.25
    assert clock.now == pytest.approx(start + 4.0 + 0.5 + 20, abs=2.0)  # warmed up, then 20 seconds


def test_a_burst_of_another_process_does_not_count_and_what_is_done_every_so_often_does():
    assert typical_seconds([0.5, 0.5, 9.0, 0.5]) == 0.5
    steps = ([1.0] * 9 + [11.0]) * 8
    assert typical_seconds(steps, period=10) == 2.0
    steps[25] = 500.0
    assert typical_seconds(steps, period=10) == 2.0
    assert typical_seconds([1.0, 1.0, 11.0, 1.0], period=10) == 1.0  # too few to tell


@pytest.mark.skipif(held("VmHWM") is None or not restart_peak(), reason="the system does not tell the peak memory")
def test_the_peak_is_what_lasts_and_what_comes_and_goes():
    module = nn.Linear(1024, 1024, bias=False)  # 4 MiB
    optimizer = torch.optim.Adam(module.parameters())
    module.weight.grad = torch.ones_like(module.weight)
    optimizer.step()
    assert lasting_bytes(module, [optimizer]) == 4 * 4 * 2**20 + 4  # weight, gradient, two moments, a count
    torch.ones(2**26)  # 256 MiB that are gone before
    memory = StepMemory(module, [optimizer], torch.device("cpu"))
    torch.ones(2**24)  # 64 MiB
    assert memory.peak() == pytest.approx(16 + 64, rel=0.05)


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.slow
def test_nothing_is_left_behind(tmp_path):
    callbacks = [ModelCheckpoint(dirpath="weights", every_n_train_steps=1), *allocation("equal")]
    kept = list(callbacks)
    data = DigitsDataModule(batch_size=500)
    settings = {"accelerator": "cpu", "max_epochs": 3, "callbacks": callbacks, "default_root_dir": "runs"}
    plan = make_plan(task(STRATEGIES["equal"]()), data, settings, seconds=0.1)
    assert plan.left_out == ("ModelCheckpoint",)
    assert plan.backprop is not None
    assert callbacks == kept
    assert data.batch_size == 500
    assert files(tmp_path) == []
    assert not list((tmp_path / "temporary").iterdir())


QUICKSTART = ["plan", "--config", str(REPOSITORY / "configs/vit_tiny_digits.yaml"), "--model.checkpoint", ""]


@pytest.mark.slow
def test_the_command_says_what_the_quickstart_costs(capsys, tmp_path):
    main([*QUICKSTART, "--seconds", "1"])
    lines = {line[:22].strip(): line[22:].split() for line in capsys.readouterr().out.splitlines() if line}
    threads = f"{torch.get_num_threads()} threads"
    assert " ".join(lines["run"]) == f"LikelihoodRatio with GaussianAllocator, on cpu, {threads}"
    assert " ".join(lines["samples of an epoch"]) == "1,257, in batches of 64"
    assert " ".join(lines["steps"]) == "20 an epoch, 240 in all"
    assert " ".join(lines["validations"]) == "12, of 3 batches each"
    assert [lines[site][0] for site in ("lower", "middle", "top", "head", "all")] == ["1,280"] * 4 + ["5,120"]
    assert lines["the whole run"][0] == f"{12 * 1257 * 80:,}"
    own, backprop = (float(seconds) for seconds in lines["seconds a step"])
    assert 0 < backprop < own
    assert lines["forward-equivalents"][1] == f"{3 * 64}"
    assert lines["Not in the time: what"] == ["RunSummary", "does."]
    assert files(tmp_path) == []


def test_overlays_and_settings_hold_as_for_fit(capsys):
    overlay = str(REPOSITORY / "configs/method/bp.yaml")
    main([*QUICKSTART, "--config", overlay, "--trainer.max_steps", "30", "--data.batch_size", "32", "--seconds", "0.1"])
    said = capsys.readouterr().out
    assert re.search(r"^run +Backprop, on cpu", said, re.MULTILINE)
    assert re.search(r"^steps +40 an epoch, 30 in all", said, re.MULTILINE)
    assert said.count("Backprop") == 2  # in the first line and as the one column


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--ckpt_path", "x.ckpt"], "ckpt_path = 'x.ckpt': a plan covers a whole run. Leave it out"),
        (["--seconds", "0"], "seconds = 0.0: must be a number above 0. Write, for example, 10."),
        (["--second", "3"], "--second is not a setting. Did you mean `seconds`?"),
        (["--trainer.max_epochs", "0"], "leave no step to run. Set these limits above 0, or -1 for none."),
    ],
)
def test_a_mistake_is_named_with_its_remedy(args, message, refused):
    assert message in refused(*QUICKSTART, *args)


@pytest.mark.slow
@pytest.mark.parametrize(
    "args",
    [
        ["--trainer.gradient_clip_val", "1"],
        ["--trainer.max_epochs", "-1"],  # the schedule is a cosine
        ["--model.init_args.strategy", "null"],
        ["--trainer.callbacks", "null"],  # and nobody reads the pilots
        ["--data.batch_size", "-1"],
    ],
)
def test_what_a_fit_refuses_is_refused_in_the_same_words(args, refused):
    planned, fitted = (refused(command, *QUICKSTART[1:], *args) for command in ("plan", "fit"))
    assert planned == fitted != ""


@pytest.mark.slow
def test_without_a_derivative_there_is_no_backprop():
    made = task(STRATEGIES["likelihood ratio"](), loss="flops_lightning.objectives.zero_one_error")
    plan = make_plan(made, DigitsDataModule(batch_size=500), {**LEAN, "max_epochs": 1}, seconds=0.01)
    assert plan.backprop is None
    assert "has no derivative." in plan.no_backprop
    assert f"Backprop: {plan.no_backprop}" in text(plan)


def test_what_cannot_be_planned_is_refused():
    with pytest.raises(SettingError, match=r"LightningModule.*has no `strategy`"):
        make_plan(LightningModule(), None, {**LEAN, "max_epochs": 1})
    with pytest.raises(ValueError, match=r"`val_check_interval` \(4\) must be less than or equal"):  # by Lightning
        planned("backprop", val_check_interval=4)


@pytest.mark.slow
def test_the_batch_size_is_noise_over_signal_and_the_planned_steps_keep_the_weights():
    generator, dims, size, steps = torch.Generator().manual_seed(0), 100, 8, STEPS
    gradient, noise = torch.full((dims,), 0.1), GradientNoise()  # |g|^2 = 1
    for _ in range(steps):
        drawn = torch.randn(dims, generator=generator) * (500 / size / dims) ** 0.5  # N = 500
        noise.add([(gradient + drawn)[:30], (gradient + drawn)[30:]], size)
        noise.add([torch.full((dims,), 1e9)], size - 1)  # the last batch of an epoch
        noise.add([drawn[:30]], size)  # a site lost its queries
        noise.add([], size)  # all did
    # Standard error of |g|^2: 4 g^T C g / n + 2 tr C^2 / n^2, with C = N / (B d) times the identity.
    spread = 500 / size
    error = (4 * spread / dims / steps + 2 * spread**2 / dims / steps**2) ** 0.5
    assert noise.batch_size == pytest.approx(500, rel=4 * error)

    made = task(STRATEGIES["likelihood ratio"]())
    before = [p.detach().clone() for p in made.parameters()]
    data, clock = DigitsDataModule(batch_size=64), map(float, count())
    plan = make_plan(made, data, {**LEAN, "max_epochs": 4}, seconds=9, backprop=False, clock=clock.__next__)
    assert all(torch.equal(a, b) for a, b in zip(before, made.parameters(), strict=True))
    assert plan.own.noise.steps == 11
    assert f"by 11 gradients at the start, {plan.own.noise.batch_size:,.0f} samples" in text(plan)
    others = [planned(name, batch_size=64) for name in ("mezo", "site by site", "backprop")]
    for other in (*others, planned(batch_size=64, max_steps=3)):
        assert other.own.noise.batch_size is None
        assert "Batch size" not in text(other)
