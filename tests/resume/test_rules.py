"""What is given beside ``ckpt_path`` is obeyed or refused: each line of the table in ``resume.rules``."""

import lightning.pytorch as pl
import pytest
import torch

from flops_lightning.allocators import BernoulliAllocator, EqualAllocator, OptimalAllocator, TraceSettings
from flops_lightning.callbacks import QueryAllocatorCallback
from flops_lightning.datamodules import DigitsDataModule
from flops_lightning.distributed import Communicator
from flops_lightning.errors import SettingError
from flops_lightning.meter import QueryMeter, SiteCount
from flops_lightning.resume.restore import share_meters
from flops_lightning.resume.rules import check_settings
from flops_lightning.strategies import Backprop, CoordinateFiniteDifferences, LikelihoodRatio, SiteSpec
from flops_lightning.tasks import ClipSettings, OptimizerSettings, TargetSettings
from tests.digits import TINY, two_sites
from tests.resume.runs import sites


class Spy(pl.Callback):
    """Looks at the allocator before training starts, and at the optimiser before the first step."""

    def on_train_start(self, trainer, task):
        self.allocators = [callback.state_dict() for callback in trainer.callbacks if callback is not self]

    def on_train_batch_start(self, trainer, task, *_):
        if not hasattr(self, "groups"):
            (optimizer,) = trainer.optimizers
            self.groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            self.moments = {id(p): state.get("exp_avg", p).clone() for p, state in optimizer.state.items()}
            self.sigmas = dict(getattr(task.strategy, "_widths", {}))


@pytest.fixture
def resume(make_task, make_trainer, tmp_path):
    """Train 3 steps, resume with other settings, and look: the checkpoint, the resumed task and what it began with."""

    def run(before=None, now=None, *, steps=3, data=None, data_now=None, allocator=None, allocator_now=None, **trainer):
        def callbacks(each):
            return [QueryAllocatorCallback(allocator=each)] if each else []

        first = make_trainer(*callbacks(allocator), max_steps=steps, max_epochs=4)
        first.fit(make_task(**(before or {})), data or DigitsDataModule(batch_size=16))
        first.save_checkpoint(tmp_path / "run.ckpt")
        spy, task = Spy(), make_task(**(now or {}))
        second = make_trainer(*callbacks(allocator_now or allocator), spy, **{"max_epochs": 2, **trainer})
        second.fit(task, data_now or DigitsDataModule(batch_size=16), ckpt_path=tmp_path / "run.ckpt")
        return torch.load(tmp_path / "run.ckpt", weights_only=True), task, spy

    return run


HAS = "the checkpoint's run has"


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ({}, {"model_kwargs": {**TINY, "num_heads": 4}}, f"model_kwargs = .*'num_heads': 4.*: {HAS} .*'num_heads': 2"),
        ({"freeze": ["blocks.0.*"]}, {"freeze": ["blocks.1.*"]}, "freeze = "),
        ({"target": TargetSettings(kind="lora")}, {"target": TargetSettings(kind="lora", alpha=3)},
         f"target.alpha = 3: {HAS}"),
        ({}, {"checkpoint": "other"}, f"checkpoint = 'other.safetensors': {HAS} ''"),
        ({}, {"optimizer": OptimizerSettings(name="sgd")}, f"optimizer.name = 'sgd': {HAS} 'adam'"),
        ({}, {"strategy": Backprop()}, f"strategy = 'Backprop': {HAS} 'LikelihoodRatio'"),
        ({}, {"strategy": LikelihoodRatio(sites=sites(), seed=0)}, "strategy.sites = "),
        ({}, {"strategy": LikelihoodRatio(sites=two_sites().specs, seed=1)}, "strategy.seed = 1"),
    ],
)  # fmt: skip
def test_refused_of_the_model(resume, make_task, tmp_path, before, now, message):
    if "lora" in str(now):
        pytest.importorskip("peft", reason="LoRA needs the extra peft")
    if now.get("checkpoint"):
        now["checkpoint"] = str(tmp_path / "other.safetensors")
        make_task().export_weights(now["checkpoint"])
    with pytest.raises(SettingError, match=message):
        resume({"strategy": Backprop(), **before} if before else {}, {"strategy": Backprop(), **now} if before else now)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"batch_size": 8}, "data.batch_size = 8: the checkpoint's run has 16 and stopped in the middle of an epoch"),
        ({"batch_size": 16, "rotation": 10.0}, "data.rotation = 10.0: .*middle of an epoch"),
        ({"batch_size": 16, "split_seed": 1}, "data.split_seed = 1: the checkpoint's run has 0"),
    ],
)
def test_refused_of_the_data_within_an_epoch(resume, data, message):
    with pytest.raises(SettingError, match=message):
        resume(steps=2, data_now=DigitsDataModule(**data))


def test_another_batch_size_is_obeyed_at_the_end_of_an_epoch(resume):
    _, task, _ = resume(steps=3, data_now=DigitsDataModule(batch_size=8))
    assert task.strategy.meter.sites["clean"].clean_passes == 3 * 16 + 3 * 8


def test_another_seed_of_the_run_is_refused(resume, monkeypatch, make_task):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    pl.seed_everything(0, verbose=False)
    saved = {"seed_everything": 0}
    with pytest.raises(SettingError, match="seed_everything = 1: the checkpoint's run has 0"):
        check_settings(saved, {"seed_everything": 1}, within_epoch=False)
    assert check_settings(saved, {"seed_everything": None}, within_epoch=False) == []


def test_optimiser_settings_are_obeyed_and_moments_kept(resume):
    now = OptimizerSettings(lr=3e-4, weight_decay=0.01)
    saved, task, spy = resume({"optimizer": OptimizerSettings(lr=1e-3)}, {"optimizer": now})
    assert [(group["lr"], group["weight_decay"]) for group in spy.groups] == [(3e-4, 0.01), (3e-4, 0.0)]
    (state,) = saved["optimizer_states"]
    own = [p for p in task.backbone.parameters() if p.requires_grad]  # in the order of the one group that was saved
    assert len(state["state"]) == len(own) == len(spy.moments)
    for place, parameter in enumerate(own):
        assert float(state["state"][place]["step"]) == 3
        assert torch.equal(spy.moments[id(parameter)], state["state"][place]["exp_avg"])


@pytest.mark.parametrize(
    ("before", "now", "epochs", "expected"),
    [
        ({"lr": 1e-3}, {"lr": 1e-3, "schedule": "cosine"}, 2, {"lr": 1e-3 * 0.5}),  # step 3 of 6
        ({"lr": 1e-3, "schedule": "cosine"}, {"lr": 1e-3, "schedule": "cosine"}, 3, {"lr": 1e-3 * 0.75}),  # of 9
        ({"name": "sgd"}, {"name": "sgd", "momentum": 0.5}, 2, {"momentum": 0.5}),
    ],
)  # fmt: skip
def test_the_schedule_is_the_present_one_at_the_present_step(resume, before, now, epochs, expected):
    settings = ({"optimizer": OptimizerSettings(**each)} for each in (before, now))
    _, _, spy = resume(*settings, max_epochs=epochs)
    assert {name: spy.groups[0][name] for name in expected} == pytest.approx(expected)


def test_what_the_step_reads_is_obeyed_and_named(resume, caplog):
    now = {"clip": ClipSettings(norm=0.5), "label_smoothing": 0.1, "max_skipped_steps": 3}
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        _, task, _ = resume({}, now)
    assert (task.clip_settings.norm, task.label_smoothing, task.max_skipped_steps) == (0.5, 0.1, 3)
    (line,) = [r.getMessage() for r in caplog.records if "settings that differ" in r.getMessage()]
    for part in (
        "clip.norm 0.0 -> 0.5",
        "label_smoothing 0.0 -> 0.1",
        "max_skipped_steps 10 -> 3",
        "max_epochs 4 -> 2",
    ):
        assert part in line


def test_queries_and_a_fixed_sigma_are_obeyed(resume):
    before = LikelihoodRatio(sites=sites(sigma=0.01), seed=0)
    wider = [SiteSpec(**{**vars(s), "sigma": 0.05, "queries_per_sample": 8}) for s in sites()]
    saved, task, _ = resume({"strategy": before}, {"strategy": LikelihoodRatio(sites=wider, seed=0, variant="plain")})
    then = saved["forward_gradient"]["strategy"]["meter"]["lower"]["queries"]
    assert then == 3 * 16 * 4
    assert task.strategy.meter.sites["lower"].queries == then + 3 * 16 * 8


def test_a_learned_sigma_starts_anew_where_it_is_set_anew(resume):
    before = LikelihoodRatio(sites=sites(sigma=0.01), seed=0, learn_sigma=0.1)
    upper = SiteSpec(**{**vars(sites()[1]), "sigma": 0.05})
    now = LikelihoodRatio(sites=[sites(sigma=0.01)[0], upper], seed=0, learn_sigma=0.1)
    saved, _, spy = resume({"strategy": before}, {"strategy": now})
    learned = saved["forward_gradient"]["strategy"]["learned_sigma"]["lower"]["log_sigma"]
    assert spy.sigmas["upper"].sigma == pytest.approx(0.05)
    assert spy.sigmas["lower"].sigma == pytest.approx(float(torch.tensor(learned, dtype=torch.float64).exp()))
    assert spy.sigmas["lower"].sigma != pytest.approx(0.01, rel=1e-3)


def test_zo_grasp_is_run_again_where_its_settings_change(resume):
    few = {"coordinates": 4, "grasp_queries": 2, "seed": 0}
    before, now = (CoordinateFiniteDifferences(**few, keep=keep) for keep in (0.1, 0.2))
    saved, task, _ = resume({"strategy": before}, {"strategy": now})
    then = saved["forward_gradient"]["strategy"]["meter"]["zo_grasp"]["queries"]
    assert task.strategy.meter.sites["zo_grasp"].queries == 2 * then > 0


def test_another_allocator_starts_with_an_empty_memory(resume):
    _, task, _ = resume(allocator=OptimalAllocator(), allocator_now=EqualAllocator())
    assert task.strategy.draw == 6


@pytest.mark.parametrize("given", [0.5, 0.9])
def test_the_p_given_to_an_optimised_bernoulli_allocator_is_where_it_starts(resume, given):
    before, now = (BernoulliAllocator(p=p, traces=TraceSettings(source="prediction")) for p in (0.5, given))
    saved, _, spy = resume(allocator=before, allocator_now=now)
    learned = saved["callbacks"]["QueryAllocatorCallback[BernoulliAllocator]"]["p"]
    assert learned != 0.5
    assert spy.allocators[0]["p"] == (learned if given == 0.5 else given)


def test_an_unchanged_run_has_nothing_to_tell(resume, caplog):
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        resume(max_epochs=4, max_steps=3)
    assert not [r for r in caplog.records if "settings that differ" in r.getMessage()]


@pytest.mark.parametrize(
    ("then", "now", "expected"), [(2, 2, [5, 7]), (2, 1, [12]), (2, 3, [12, 0, 0]), (1, 2, [5, 0])]
)
def test_ranks_go_on_counting_what_was_paid_and_no_query_counts_twice(then, now, expected):
    class Ranks(Communicator):
        def __init__(self, rank: int) -> None:
            self.rank, self.size = rank, now

    saved = [QueryMeter({"a": SiteCount(queries=queries)}).state_dict() for queries in (5, 7)[:then]]
    meters = [QueryMeter({"b": SiteCount(queries=1)}) for _ in range(now)]
    for rank, meter in enumerate(meters):
        share_meters(meter, saved, Ranks(rank))
    assert [meter.total().queries for meter in meters] == expected


def test_a_checkpoint_from_before_settings_were_saved_is_compared_by_those_of_the_task(
    make_task, make_trainer, digits, tmp_path
):
    def task(**optimizer):
        return make_task(freeze=["blocks.0.*"], strategy=Backprop(), optimizer=OptimizerSettings(**optimizer))

    first, spy = make_trainer(max_steps=3), Spy()
    first.fit(task(lr=0.001), digits)
    first.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    del saved["forward_gradient"]["settings"]
    torch.save(saved, tmp_path / "run.ckpt")
    make_trainer(spy, max_epochs=2).fit(task(lr=0.01), digits, ckpt_path=tmp_path / "run.ckpt")
    assert {group["initial_lr"] for group in spy.groups} == {0.01}
    with pytest.raises(SettingError, match=f"optimizer.name = 'sgd': {HAS} 'adam'"):
        make_trainer(max_epochs=2).fit(task(name="sgd"), digits, ckpt_path=tmp_path / "run.ckpt")


def test_as_many_classes_of_other_things_are_refused(make_task, make_trainer, digits, tmp_path):
    class Letters(DigitsDataModule):
        class_names = tuple("abcdefghij")

    trainer = make_trainer()
    trainer.fit(make_task(), digits)
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    with pytest.raises(SettingError, match=r"data = 'a': the checkpoint was trained on '0' instead"):
        make_trainer().test(make_task(), Letters(batch_size=32), ckpt_path=tmp_path / "c.ckpt")
