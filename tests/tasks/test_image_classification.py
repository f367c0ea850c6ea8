import copy
import pickle
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from flops_lightning.allocators import (
    CostAwareAllocator,
    EqualAllocator,
    GaussianAllocator,
    OptimalAllocator,
    TraceSettings,
)
from flops_lightning.callbacks import QueryAllocatorCallback
from flops_lightning.distributed import Communicator
from flops_lightning.errors import LostQueriesError, SettingError
from flops_lightning.objectives import zero_one_error
from flops_lightning.strategies import Backprop, LikelihoodRatio, PilotSpec
from flops_lightning.tasks import ClipSettings, ForwardImageClassifier, OptimizerSettings
from flops_lightning.tasks.trainer_setup import check_trainer
from tests.digits import MODEL, two_sites


def parameters(task: ForwardImageClassifier) -> Tensor:
    return torch.cat([p.detach().flatten() for p in task.backbone.parameters()]).clone()


def allocator() -> QueryAllocatorCallback:
    return QueryAllocatorCallback(allocator=GaussianAllocator())


PILOTED = {"queries": 8, "pilots": PilotSpec(sites="head", queries=2)}


class TestTraining:
    def test_meter_equals_what_the_settings_say(self, make_task, make_trainer, digits):
        task = make_task(strategy=two_sites(**PILOTED))
        make_trainer(allocator()).fit(task, digits)
        total = task.strategy.meter.total()
        samples = 3 * 32
        assert total.clean_passes == samples
        assert total.queries == 2 * 8 * samples
        assert task.strategy.meter.sites["head"].pilots == total.pilots == 2 * samples
        assert total.lost == 0
        assert task.strategy.draw == 3  # one clean pass a batch

    def test_equal_allocator_equals_no_allocator(self, make_task, make_trainer, digits):
        ends = []
        for callbacks in ([], [QueryAllocatorCallback(allocator=EqualAllocator())]):
            task = make_task()
            make_trainer(*callbacks).fit(task, digits)
            ends.append(parameters(task))
        assert torch.equal(*ends)

    def test_callbacks_of_lightning_work(self, make_task, make_trainer, digits, tmp_path):
        best = ModelCheckpoint(dirpath=tmp_path, monitor="val/accuracy", mode="max", filename="best")
        stopping = EarlyStopping(monitor="val/accuracy", mode="max", patience=0, min_delta=1.0)
        task = make_task(optimizer=OptimizerSettings(lr=1e-3, schedule="cosine"))
        settings = {"enable_checkpointing": True, "max_epochs": 5, "log_every_n_steps": 1}
        rates = LearningRateMonitor("step")
        trainer = make_trainer(best, stopping, rates, logger=CSVLogger(tmp_path), **settings)
        trainer.fit(task, digits)
        assert trainer.current_epoch < 4  # it stopped early: an improvement of 100 % is never met
        assert (tmp_path / "best.ckpt").is_file()
        assert rates.lrs["lr"] == sorted(rates.lrs["lr"], reverse=True)
        assert 0 < rates.lrs["lr"][-1] < rates.lrs["lr"][0] == pytest.approx(1e-3)

    def test_attention_is_clipped_apart(self, make_task, make_trainer, digits):
        task = make_task(
            clip=ClipSettings(norm=1e-3, attention_norm=1e-4), optimizer=OptimizerSettings(name="sgd", lr=1.0)
        )
        before = {n: p.detach().clone() for n, p in task.backbone.named_parameters()}
        make_trainer(limit_train_batches=1).fit(task, digits)
        moves = {n: p.detach() - before[n] for n, p in task.backbone.named_parameters()}
        attention = torch.cat([m.flatten() for n, m in moves.items() if ".attn." in n]).norm()
        rest = torch.cat([m.flatten() for n, m in moves.items() if ".attn." not in n]).norm()
        assert float(attention) == pytest.approx(1e-4, rel=1e-2)
        assert float(rest) == pytest.approx(1e-3, rel=1e-2)


class TestLostQueries:
    @staticmethod
    def poison(task: ForwardImageClassifier) -> None:
        task.loss = lambda logits, labels: logits.sum(1) * torch.nan
        task.strategy.bind(task.network, task.loss)

    def test_a_run_of_skipped_steps_stops_with_what_to_change(self, make_task, make_trainer, digits):
        task = make_task(max_skipped_steps=1)
        before = parameters(task)
        self.poison(task)
        with (
            pytest.raises(LostQueriesError, match=r"2 steps in a row .*max_skipped_steps = 1.*Lower optimizer.lr"),
            pytest.warns(RuntimeWarning, match="lost every query"),
        ):
            make_trainer().fit(task, digits)
        assert torch.equal(parameters(task), before)
        assert task.strategy.draw == 2  # the draw counter advances on skipped steps too

    def test_skipped_steps_in_between_are_survived(self, make_task, make_trainer, digits):
        task = make_task(max_skipped_steps=1)
        plain = task.loss

        def sometimes(logits: Tensor, labels: Tensor) -> Tensor:
            return plain(logits, labels) * (torch.nan if task.strategy.draw == 0 else 1.0)

        task.strategy.bind(task.network, sometimes)
        trainer = make_trainer()
        with pytest.warns(RuntimeWarning, match="lost every query"):
            trainer.fit(task, digits)
        assert trainer.global_step == 2


class TestCheckpoints:
    @pytest.mark.parametrize(
        ("settings", "allocator"),
        [
            (PILOTED, GaussianAllocator()),
            (PILOTED, OptimalAllocator(traces=TraceSettings(source="both"))),
            ({"queries": 8}, CostAwareAllocator(metric="preconditioned")),
            ({"queries": 8, "update": "site_by_site"}, None),
        ],
    )
    def test_resuming_equals_an_uninterrupted_run(self, make_task, make_trainer, digits, tmp_path, settings, allocator):
        def fit(epochs: int, **start: Any) -> tuple[ForwardImageClassifier, pl.Trainer]:
            task = make_task(strategy=two_sites(**settings), optimizer=OptimizerSettings(lr=1e-3))
            callbacks = [QueryAllocatorCallback(allocator=copy.deepcopy(allocator))] if allocator else []
            trainer = make_trainer(*callbacks, max_epochs=epochs)
            trainer.fit(task, digits, **start)
            return task, trainer

        whole, _ = fit(2)
        fit(1)[1].save_checkpoint(tmp_path / "half.ckpt")
        resumed, _ = fit(2, ckpt_path=tmp_path / "half.ckpt")
        assert torch.equal(parameters(resumed), parameters(whole))
        assert resumed.strategy.meter.total() == whole.strategy.meter.total()
        assert resumed.strategy.draw == whole.strategy.draw

    def test_loads_with_weights_only(self, make_task, make_trainer, digits, tmp_path):
        task = make_task(freeze=["pos_embed"], optimizer=OptimizerSettings(name="adamw"), label_smoothing=0.1)
        trainer = make_trainer(QueryAllocatorCallback(allocator=EqualAllocator()))
        trainer.fit(task, digits)
        trainer.save_checkpoint(tmp_path / "run.ckpt")
        torch.load(tmp_path / "run.ckpt", weights_only=True)
        loaded = ForwardImageClassifier.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
        assert torch.equal(parameters(loaded), parameters(task))
        assert loaded.optimizer_settings.name == "adamw"
        assert loaded.network.frozen() == ("pos_embed",)
        metrics = make_trainer().test(loaded, digits, verbose=False)
        assert metrics == make_trainer().test(task, digits, verbose=False)

    def test_without_strategy_it_predicts_and_refuses_to_fit(self, make_task, make_trainer, digits):
        task = make_task(strategy=None)
        batches = make_trainer().predict(task, digits)
        digits.setup("test")
        images, _ = next(iter(digits.test_dataloader()))
        assert torch.allclose(batches[0]["probability"], task.eval()(images).softmax(1), atol=1e-6)
        assert torch.equal(batches[0]["label"], batches[0]["probability"].argmax(1))
        with pytest.raises(SettingError, match=r"strategy = None: training needs a strategy"):
            make_trainer().fit(task, digits)


@pytest.mark.parametrize("kind", ["all", "visual_prompt"])
def test_copies_and_pickles_keep_their_stages(make_task, kind):
    task = make_task(target={"kind": kind}, strategy=None)
    for twin in (copy.deepcopy(task), pickle.loads(pickle.dumps(task))):
        with torch.no_grad():
            twin.backbone.head.bias.add_(1.0)
        x = torch.randn(2, 1, 8, 8)
        assert torch.allclose(twin.network.run(x), twin.backbone(x))
        assert not torch.allclose(twin.network.run(x), task.backbone(x))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_name": "vit_tinny_patch16_224"}, r"model_name .*Did you mean \['vit_tiny_patch16_224'"),
        ({"model_name": "resnet18", "model_kwargs": {}}, "network = .*BatchNorm|network = 'ResNet'"),
        ({"model_kwargs": {"colour": 3}}, "model_kwargs .*Remove what it does not take"),
        ({"model_kwargs": {"num_classes": 3}}, r"model_kwargs.num_classes = 3: comes from the data. Remove it"),
        ({"pretrained": True, "checkpoint": "x.ckpt"}, "pretrained = True: `checkpoint` is given as well"),
        ({"freeze": ["blocks.9.*"]}, r"freeze = 'blocks.9.\*': matches no parameter. Write a pattern"),
        ({"label_smoothing": 1.0}, "label_smoothing = 1.0: must be in .0, 1."),
        ({"loss": zero_one_error, "label_smoothing": 0.1}, "label_smoothing = 0.1: has no effect on a `loss`"),
        ({"loss": "flops_lightning.objectives.zero_won"}, "loss = '.*zero_won': cannot be imported .*dotted path"),
        ({"max_skipped_steps": -1}, "max_skipped_steps = -1: must be 0 or more"),
        ({"optimizer": OptimizerSettings(lr=0.0)}, "optimizer.lr = 0.0: must be a number above 0"),
        ({"optimizer": OptimizerSettings(name="adam", momentum=0.9)}, "optimizer.momentum = 0.9: adam has no"),
        (
            {"optimizer": OptimizerSettings(name="lion")},
            "optimizer.name = 'lion': is neither one of adam, adamw, muon, sgd nor",
        ),
        ({"clip": ClipSettings(norm=-1.0)}, "clip.norm = -1.0: must be 0 or more. Write 0 for none"),
        ({"optimizer": {"betas": (0.9, 0.99)}}, "optimizer = .*has no setting 'betas'.*Choose from name"),
        ({"optimizer": torch.optim.Adam}, "optimizer = .*must be OptimizerSettings"),
        ({"clip": 1.0}, r"clip = 1.0: must be ClipSettings\(...\) or a mapping"),
    ],
)
def test_bad_settings_name_themselves_and_the_remedy(settings, message):
    with pytest.raises(SettingError, match=message):
        ForwardImageClassifier(**{**MODEL, **settings})


def with_kwargs(**kwargs: Any) -> dict[str, Any]:
    return {"model_kwargs": {**MODEL["model_kwargs"], **kwargs}}


@pytest.mark.parametrize(
    ("task", "trainer", "allocator", "message"),
    [
        (with_kwargs(img_size=16), {}, None, r"model_kwargs.img_size = \(16, 16\): the images are 8 x 8. Write img_"),
        (with_kwargs(in_chans=3), {}, None, "model_kwargs.in_chans = 3: the images have 1 channels. Write in_chans: 1"),
        ({}, {"gradient_clip_val": 1.0}, None, r"trainer.gradient_clip_val = 1.0: .*clip.norm"),
        ({}, {"accumulate_grad_batches": 2}, None, "trainer.accumulate_grad_batches = 2: .*optimizer.accumulate"),
        ({}, {"precision": "bf16-true"}, None, "trainer.precision = 'bf16-true': .*Choose from 32-true"),
        ({"strategy": two_sites(**PILOTED)}, {}, None, "strategy.pilots.queries = 2: no allocator asks for pilots"),
        ({"strategy": two_sites(**PILOTED)}, {}, OptimalAllocator, "this allocator does not read.*Write 0, or use"),
        ({"strategy": Backprop()}, {}, EqualAllocator, "trainer.callbacks = .*Backprop spends no queries .*Remove the"),
        ({"strategy": Backprop(), "loss": zero_one_error}, {}, None,
         "loss = 'flops_lightning.objectives.zero_one_error': has no derivative. Use a strategy that needs none"),
        ({"loss": "torch.nn.functional.cross_entropy"}, {}, None,
         r"loss = 'torch.nn.functional.cross_entropy': returned the shape \(\) for 32 rows. Return one loss a row"),
    ],
)  # fmt: skip
def test_what_cannot_train_is_refused_at_once(make_task, make_trainer, digits, task, trainer, allocator, message):
    callbacks = [QueryAllocatorCallback(allocator=allocator())] if allocator else []
    with pytest.raises(SettingError, match=message):
        make_trainer(*callbacks, **trainer).fit(make_task(**task), digits)


def fitting(**attributes: Any) -> Any:
    """A trainer in so far as the checks look at it, with settings that a machine without accelerators cannot have."""
    usual = {
        "strategy": SingleDeviceStrategy(), "state": SimpleNamespace(fn=TrainerFn.FITTING), "world_size": 1,
        "precision": "32-true", "gradient_clip_val": None, "gradient_clip_algorithm": None,
        "accumulate_grad_batches": 1, "callbacks": [], "_accelerator_connector": SimpleNamespace(_layer_sync=None),
    }  # fmt: skip
    return SimpleNamespace(**{**usual, **attributes})


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"strategy": object.__new__(FSDPStrategy)}, "strategy = 'FSDPStrategy': shards .*trainer.strategy: auto"),
        ({"strategy": object.__new__(DeepSpeedStrategy)}, "trainer.strategy = 'DeepSpeedStrategy': shards"),
        ({"world_size": 2}, "trainer.strategy = 'SingleDeviceStrategy': .*Write trainer.strategy: auto"),
    ],
)
def test_hardware_settings_that_cannot_work_are_refused(attributes, message):
    check_trainer(fitting())
    with pytest.raises(SettingError, match=message):
        check_trainer(fitting(**attributes))


def test_bf16_mixed_learns_and_warns_of_a_sigma_it_cannot_resolve(make_task, make_trainer, digits):
    sites = [replace(spec, sigma=1e-4) for spec in two_sites().specs]
    task = make_task(strategy=LikelihoodRatio(sites=sites, seed=0))
    before = parameters(task)
    with pytest.warns(RuntimeWarning, match=r"sigma = 0.0001 at site .* below what torch.bfloat16 resolves"):
        make_trainer(precision="bf16-mixed").fit(task, digits)
    assert parameters(task).dtype == torch.float32
    assert (parameters(task) != before).any()


def test_what_is_replaced_frozen_or_thawed_after_construction_is_noticed(make_task, make_trainer, digits):
    task = make_task(freeze="pos_embed")
    task.backbone.head = torch.nn.Linear(16, 10)
    task.backbone.requires_grad_(True)
    task.backbone.cls_token.requires_grad_(False)
    before = {n: p.detach().clone() for n, p in task.backbone.named_parameters()}
    make_trainer().fit(task, digits)
    moved = {n for n, p in task.backbone.named_parameters() if (p != before[n]).any()}
    assert set(before) - moved == {"cls_token"}


@pytest.mark.parametrize("strategy", [two_sites(), Backprop()])
def test_a_strategy_serves_one_task(make_task, strategy):
    make_task(strategy=strategy)
    with pytest.raises(SettingError, match=r"already serves another network. Make one for each"):
        make_task(strategy=strategy)


def test_steps_count_when_the_last_site_of_a_batch_loses_everything(make_task, make_trainer, digits):
    task = make_task(strategy=two_sites(update="site_by_site"))
    plain = task.loss

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        # The body's queries come last and move the logits by way of the head: lose them all, and only them.
        calls.append(len(logits))
        return plain(logits, labels) * (torch.nan if len(calls) % 4 == 0 else 1.0)

    calls: list[int] = []  # of a batch: clean pass, head, clean pass again, body
    task.strategy.bind(task.network, loss)
    trainer = make_trainer(max_steps=2, max_epochs=-1)
    with pytest.warns(RuntimeWarning, match="lost every query"):
        trainer.fit(task, digits)
    assert trainer.global_step == 2
    assert len(calls) == 8


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_steps_alone_limit_a_run_that_accumulates(make_task, make_trainer, digits, schedule):
    task = make_task(optimizer=OptimizerSettings(accumulate_grad_batches=2, schedule=schedule, lr=1e-3))
    trainer = make_trainer(max_steps=4, max_epochs=-1)
    trainer.fit(task, digits)
    assert trainer.global_step == 4
    assert trainer.current_epoch == 2  # of three batches, which make two steps
    rate = trainer.optimizers[0].param_groups[0]["lr"]
    assert rate == pytest.approx(1e-3 if schedule == "constant" else 0.0, abs=1e-9)


def test_processes_with_different_seeds_are_refused(make_task):
    class Two(Communicator):
        size = 2

        def gather(self, tensor: Tensor) -> list[Tensor]:
            other = tensor.clone()
            other[-1] += 1  # the last digit of a seed in JSON
            return [tensor, other if len(tensor) > 1 else tensor]

    strategy = make_task(strategy=LikelihoodRatio(seed=10)).strategy
    with pytest.raises(
        SettingError, match=r"strategy.seed = 10: the processes of this run have different seeds, \[10, 11\]"
    ):
        strategy.join(Two())


def test_a_checkpoint_serves_its_own_network_and_settings_and_only_a_resumed_run_keeps_counting(
    make_task, make_trainer, digits, tmp_path
):
    file, trainer = tmp_path / "run.ckpt", make_trainer()
    trainer.fit(make_task(), digits)
    trainer.save_checkpoint(file)
    loaded = ForwardImageClassifier.load_from_checkpoint(file, strategy=two_sites(), weights_only=True)
    assert loaded.strategy.draw == loaded.strategy.meter.total().queries == 0
    with pytest.raises(SettingError, match=r"optimizer = '43 parameters': .*Resume with the configuration of that run"):
        make_trainer(max_epochs=2).fit(make_task(freeze=["pos_embed"]), digits, ckpt_path=file)
    wider = make_task(model_kwargs={**MODEL["model_kwargs"], "embed_dim": 32})
    with pytest.raises(SettingError, match=r"ckpt_path = 'backbone.cls_token': is \(1, 1, 16\) in the checkpoint and"):
        make_trainer().test(wider, digits, ckpt_path=file, verbose=False)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"image": torch.zeros(2, 1, 8, 8)}, r"data = 'dict': a batch must be a pair \(inputs, targets\)"),
        ((torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(2, dtype=torch.long)), "images must be floats"),
    ],
)
def test_batches_of_another_kind_are_refused(make_task, batch, message):
    with pytest.raises(SettingError, match=message):
        make_task().sample_statistics(batch)


class TestLoss:
    @pytest.mark.parametrize("loss", [zero_one_error, "flops_lightning.objectives.zero_one_error"])
    def test_it_is_what_is_minimised_and_reported(self, make_task, make_trainer, digits, tmp_path, loss):
        task = make_task(loss=loss)
        trainer = make_trainer()
        trainer.fit(task, digits)
        trainer.save_checkpoint(tmp_path / "run.ckpt")
        loaded = ForwardImageClassifier.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
        assert loaded.objective is zero_one_error
        (metrics,) = make_trainer().test(loaded, digits, verbose=False)
        assert metrics["test/loss"] == pytest.approx(1.0 - metrics["test/accuracy"])
        predicted = make_trainer().predict(loaded, digits)
        expected = make_trainer().predict(task, digits)
        assert all(torch.equal(a["label"], b["label"]) for a, b in zip(predicted, expected, strict=True))

    def test_a_loss_without_a_path_must_be_given_again(self, make_task, make_trainer, digits, tmp_path):
        def hinge(logits: Tensor, labels: Tensor) -> Tensor:
            own = logits.gather(1, labels[:, None])
            return (logits - own + 1).clamp_min(0).sum(1)

        trainer = make_trainer()
        trainer.fit(make_task(loss=hinge), digits)
        trainer.save_checkpoint(tmp_path / "run.ckpt")
        with pytest.raises(SettingError, match=r"loss = '.*hinge\(\.\.\.\)': cannot be imported .*give the function"):
            ForwardImageClassifier.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
        again = ForwardImageClassifier.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True, loss=hinge)
        assert again.objective is hinge

    def test_a_loss_that_reduces_is_refused_in_validation_too(self, make_task, make_trainer, digits):
        task = make_task(loss="torch.nn.functional.cross_entropy")
        with pytest.raises(SettingError, match=r"cross_entropy': returned the shape \(\) for 32 rows"):
            make_trainer().validate(task, digits)
