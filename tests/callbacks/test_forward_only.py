"""``ForwardOnly`` trains as the task does, and leaves everything but the gradient as backprop leaves it."""

import copy
import csv
import random
import re
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.optim.swa_utils import SWALR
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from flops_lightning.allocators import EqualAllocator
from flops_lightning.callbacks import ForwardOnly, QueryAllocatorCallback
from flops_lightning.errors import LostQueriesError, SettingError
from flops_lightning.strategies import SPSA, LikelihoodRatio, MeZO, SiteSpec
from tests.callbacks.unchanged import BATCHES, Plain, Task, batches, fit, parameters, resumed, trained
from tests.digits import quiet_trainer
from tests.processes import run_module

pytestmark = pytest.mark.filterwarnings("ignore:.*sigma = .* has no effect", "ignore:.*below what the precision")


@pytest.fixture(autouse=True)
def _no_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    def backward(*_: Any, **__: Any) -> None:
        raise AssertionError("a backward pass")

    monkeypatch.setattr(Tensor, "backward", backward)


def forward_only(queries: int = 2, **settings: Any) -> ForwardOnly:
    return ForwardOnly(MeZO(queries=queries, seed=0, **settings))


# -- the same as the task ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queries", [2, 6])
def test_it_equals_the_task(queries):
    start = parameters(Plain())
    found, expected = (trained(MeZO(queries=queries, seed=3), task=task) for task in (False, True))
    assert (found - expected).abs().max() < 1e-10
    assert (found - start).abs().max() > 0.1


def test_spsa_with_shared_directions_is_mezo_of_as_many_queries():
    sites = [SiteSpec(stages=["network"], name="all", sigma=1e-3, queries_per_sample=4)]
    mezo, spsa = Plain(), Plain()
    spsa.load_state_dict(mezo.state_dict())
    fit(mezo, forward_only(4))
    fit(spsa, ForwardOnly(SPSA(sites=sites, seed=0)))
    assert torch.equal(parameters(spsa), parameters(mezo))


def test_accumulation_and_clipping_of_the_trainer_equal_the_tasks_own():
    torch.manual_seed(0)
    task = Task(MeZO(queries=4, seed=0), accumulate=2, clip=0.1)
    fit(task)
    torch.manual_seed(0)
    plain, twin = Plain(), forward_only(4)
    trainer = fit(plain, twin, accumulate_grad_batches=2, gradient_clip_val=0.1)
    assert (parameters(plain) - parameters(task)).abs().max() < 1e-10
    assert (trainer.global_step, trainer.callback_metrics["queries/passes"]) == (BATCHES, 4 * 2 * BATCHES)


def test_a_run_that_fails_in_mid_epoch_goes_on_bit_for_bit(tmp_path):
    found = resumed(lambda: MeZO(queries=4), tmp_path)  # its seed, that of the first run, is in the checkpoint
    torch.manual_seed(0)
    assert torch.equal(found, trained(MeZO(queries=4), task=False))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_equal_the_task_in_two_processes_and_go_on(tmp_path):
    run_module(2, "tests.callbacks.unchanged", "2", str(tmp_path), seconds=500)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    alone = trained(MeZO(queries=4, seed=0), task=False)
    for exchange in ("gradients", "losses"):
        assert (first[exchange] - first[f"{exchange} task"]).abs().max() < 1e-10
        assert torch.equal(first[f"{exchange} resumed"], first[exchange])
        assert (first[exchange] - alone).abs().max() > 1e-3
    assert all(torch.equal(first[name], second[name]) for name in first)


class Unlogged(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.net(batch[0]), batch[1])


def compiled_network(module: Plain) -> Plain:
    module.net.compile(backend="eager")
    return module


@pytest.mark.parametrize("compiled", [lambda module: torch.compile(module, backend="eager"), compiled_network])
def test_a_compiled_module_and_a_compiled_network_learn_alike(compiled):
    torch._dynamo.reset()
    counters.clear()
    plain, twin = Unlogged(), Unlogged().double()
    twin.load_state_dict(plain.state_dict())
    fit(plain, forward_only(4))
    fit(compiled(twin), forward_only(4))
    assert (parameters(twin) - parameters(plain)).abs().max() < 1e-10
    assert counters["frames"] == {"total": 2, "ok": 2}  # once for clean passes and once for queries


# -- queries leave no trace --------------------------------------------------------------------------------------------


class Average:
    """As in many training scripts."""

    def __init__(self, module: nn.Module) -> None:
        self.weights, self.updates = {name: p.detach().clone() for name, p in module.named_parameters()}, 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.updates += 1
        for name, parameter in module.named_parameters():
            self.weights[name].lerp_(parameter, 0.1)


class Busy(pl.LightningModule):
    """Everything that a step may do beside its loss: metrics, running statistics, dropout, lists, mixup, pops."""

    def __init__(self, drawn: list[Any], lr: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
        self.accuracy, self.mean = MulticlassAccuracy(3), MeanMetric()
        self.outputs: list[Tensor] = []
        self.lr, self.steps, self.generator, self.rng = lr, 0, torch.Generator(), np.random.default_rng(0)
        self.register_buffer("queue", torch.zeros(3))
        self.seen: dict[str, Tensor] = {"total": torch.zeros(1)}
        self.drawn = drawn.append  # what is outside of the module stays
        self.teacher, self.average = copy.deepcopy(self.net).requires_grad_(False), Average(self.net)
        self.others = iter(torch.utils.data.DataLoader(torch.arange(100.0), shuffle=True))

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        x, y = batch.pop("x"), batch.pop("y")
        x += 0.1 * self.queue.sum()
        numbers = [torch.rand(1), torch.rand(1, generator=self.generator), random.random(), self.rng.random()]
        numbers += [np.random.rand(), self.queue.sum(), self.steps, next(self.others)]  # noqa: NPY002
        self.drawn([float(n) for n in numbers])
        loss = F.cross_entropy(self.net(x), y)
        self.steps += 1
        self.queue = torch.cat([loss.detach().view(1), self.queue[:-1]])
        self.seen["total"] += loss.detach()
        self.average.update(self.net)
        for old, new in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
            old.data = 0.9 * old.data + 0.1 * new.data + 0.01 * loss.detach()
        self.outputs.append(loss.detach())
        self.accuracy(torch.randn(8, 3), y)
        self.mean.update(loss)
        self.log_dict({"accuracy": self.accuracy, "mean": self.mean}, on_epoch=True, batch_size=8)
        self.log("loss", loss, on_step=True, on_epoch=True, batch_size=8)
        if self.logger is not None:
            self.logger.log_metrics({"own": float(loss)}, step=self.steps)
        return {"loss": loss, "extra": loss.detach()}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=self.lr)


class Recorder(pl.loggers.logger.DummyLogger):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[Any] = []

    def log_metrics(self, metrics: Any, step: Any = None) -> None:
        self.lines.append((sorted(metrics), step))


def busy_run(*callbacks: pl.Callback, **settings: Any) -> tuple[Busy, list[Any], list[Any], Any]:
    pl.seed_everything(0, verbose=False)
    drawn: list[Any] = []
    module, logger = Busy(drawn), Recorder()
    data = [{"x": x.float(), "y": y} for x, y in batches()]
    trainer = quiet_trainer(*callbacks, max_epochs=2, logger=[logger], log_every_n_steps=1, **settings)
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None))
    metrics = {name: value for name, value in trainer.callback_metrics.items() if "queries" not in name}
    return module, drawn, logger.lines, metrics


def test_all_but_the_gradient_is_as_after_backprop(monkeypatch):
    module, drawn, lines, metrics = busy_run(forward_only())
    ends = torch.rand(1), random.random()
    monkeypatch.undo()
    other, drawn_once, expected_lines, expected = busy_run()
    assert ends == (torch.rand(1), random.random())
    assert metrics == expected
    assert {"loss_epoch", "accuracy_epoch", "mean_epoch"} <= metrics.keys()
    assert [([name for name in names if name != "queries/passes"], step) for names, step in lines] == expected_lines
    for (name, found), (_, wanted) in zip(module.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(found, wanted), name
    assert module.outputs == other.outputs
    assert (module.steps, len(module.outputs), module.seen) == (2 * BATCHES, 2 * BATCHES, other.seen)
    assert torch.equal(module.accuracy.tp, other.accuracy.tp)
    assert module.average.updates == 2 * BATCHES
    assert all(torch.equal(weights, other.average.weights[name]) for name, weights in module.average.weights.items())
    # The clean pass of a step and its two queries draw alike, from the same state.
    assert drawn == [row for row in drawn_once for _ in range(3)]
    assert len({tuple(row) for row in drawn}) == 2 * BATCHES


class Writes(Plain):
    """Logs and prints in every way."""

    def __init__(self) -> None:
        super().__init__()
        self.tell: Any = None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log_dict({"a": loss, "b": loss}, on_epoch=True)
        self.print("one line")
        for logger in self.loggers:
            logger.log_metrics({"own": 1.0}, step=self.global_step)
            logger.log_hyperparams({"step": 1})
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_scalar("scalar", 1.0, self.global_step)
                logger.experiment.flush()
        names = [(each.log_dir, each.save_dir, each.name, each.version, each.root_dir) for each in self.loggers]
        own = (self.logger is None, isinstance(self.logger, CSVLogger), self.trainer.logger is self.logger)
        self.tell((names, own, self.trainer.log_dir))
        return loss


@pytest.mark.parametrize("kinds", [[], [CSVLogger], [TensorBoardLogger], [TensorBoardLogger, CSVLogger]])
def test_loggers_show_queries_their_names_and_take_nothing(kinds, tmp_path, capsys, monkeypatch):
    counted = []
    for callbacks in ([forward_only()], []):
        folder = tmp_path / str(len(callbacks))
        module = Writes()
        told: list[Any] = []
        module.tell = told.append
        loggers = [kind(folder, name=kind.__name__) for kind in kinds]
        capsys.readouterr()
        fit(module, *callbacks, logger=loggers or False, max_epochs=1, log_every_n_steps=1, default_root_dir=folder)
        assert capsys.readouterr().out.count("one line") == BATCHES
        assert told == [told[0]] * (3 * BATCHES if callbacks else BATCHES)
        assert [each[0] for each in told[0][0]] == [each.log_dir for each in loggers]
        written = {}
        for file in folder.rglob("metrics.csv"):
            rows = list(csv.DictReader(file.open()))
            written["csv"] = [[row[name] != "" for row in rows] for name in ("own", "a_step", "train/loss")]
        for file in folder.rglob("events*"):
            events = EventAccumulator(str(file.parent)).Reload()
            written["events"] = {name: len(events.Scalars(name)) for name in ("own", "scalar", "b_step", "b_epoch")}
        counted.append(written)
        assert len(written) == len(kinds)
        monkeypatch.undo()
    assert counted[0] == counted[1]


@pytest.mark.parametrize("where", ["clean pass", "query"])
def test_after_an_exception_the_module_is_as_before(where):
    class Raises(Plain):
        calls = 0

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            type(self).calls += 1
            if type(self).calls == (4 if where == "clean pass" else 5):
                raise RuntimeError("in the step")
            return super().training_step(batch, batch_idx)

    module, callback = Raises(), forward_only()
    before = set(vars(module))
    with pytest.raises(RuntimeError, match="in the step"):
        fit(module, callback)
    assert torch.is_grad_enabled()
    assert not {"training_step", "backward", "log", "log_dict"} & set(vars(module))
    assert set(vars(module)) - {"_hparams"} == before
    Raises.calls = 5
    fit(module, callback)  # and trains again
    assert module.training_step.__func__ is Raises.training_step


def test_an_attribute_that_was_there_comes_back():
    module = Plain()
    own = module.training_step = lambda batch, batch_idx: Plain.training_step(module, batch, batch_idx)
    fit(module, forward_only())
    assert module.training_step is own


# -- Lightning's own settings ------------------------------------------------------------------------------------------


def test_only_the_optimisers_parameters_are_trained_and_unfrozen_ones_join():
    class Head(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = self.net.lower, self.net.upper

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.head.parameters(), lr=0.05)

    module, lower = Head().double(), []

    class Watch(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            lower.append(module.backbone.weight.sum().item())

    callback, before = forward_only(), module.backbone.weight.sum().item()
    fit(module, callback, Watch())
    assert set(lower) == {before}
    assert module.backbone.weight.grad is None
    lower.clear()
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.01)
    fit(module, callback, finetuning, Watch())
    assert set(lower[:BATCHES]) == {before}
    assert len(set(lower)) == BATCHES + 1


def test_a_step_may_return_nothing():
    class Skips(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) if batch_idx % 2 else None

    module, callback = Skips(), forward_only()
    fit(module, callback)
    assert callback.strategy.meter.total().queries == 2 * BATCHES
    assert parameters(module).isfinite().all()


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.bfloat16), ("16-mixed", torch.float16)])
def test_queries_run_in_the_trainers_precision_without_a_loss_scaler(precision, dtype):
    class Single(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            output = self.net(batch[0].float())
            dtypes.append(output.dtype)
            return F.cross_entropy(output, batch[1])

    dtypes: list[torch.dtype] = []
    module = Single()
    before = parameters(module)
    plugin = MixedPrecision(precision, "cpu")  # Lightning turns the word 16-mixed into bf16-mixed on a CPU
    trainer = fit(module, forward_only(sigma=0.05), precision=None, plugins=[plugin])
    assert trainer.scaler is None
    assert dtypes == [dtype] * (3 * 2 * BATCHES)
    assert not torch.equal(parameters(module), before)


def test_callbacks_that_need_automatic_optimisation_work(tmp_path):
    module = Plain()
    every = ModelCheckpoint(tmp_path, train_time_interval=timedelta(seconds=0), save_top_k=-1)
    trainer = fit(module, forward_only(), GradientAccumulationScheduler({0: 2, 1: 4}), every, enable_checkpointing=True)
    assert trainer.global_step == BATCHES // 2 + BATCHES // 4
    assert list(tmp_path.glob("*.ckpt"))
    trainer = fit(Plain(), forward_only(), StochasticWeightAveraging(swa_lrs=0.007, swa_epoch_start=1))
    assert isinstance(trainer.lr_scheduler_configs[0].scheduler, SWALR)
    averaged, module = Plain(), Plain()
    averaged.load_state_dict(module.state_dict())
    fit(module, forward_only())
    fit(averaged, forward_only(), EMAWeightAveraging(decay=0.5))
    assert 0 < (parameters(averaged) - parameters(module)).abs().max() < 0.2
    fit(Plain(), forward_only(), fast_dev_run=True)


def test_the_learning_rate_finder_sees_forward_only_steps(tmp_path):
    class Rated(Plain):
        lr = 0.05

    module, finder = Rated(), LearningRateFinder(min_lr=1e-4, max_lr=1.0, num_training_steps=BATCHES, update_attr=False)
    fit(module, forward_only(), finder, default_root_dir=tmp_path)
    losses = torch.tensor(finder.optimal_lr.results["loss"])
    assert losses.isfinite().all()
    assert len(set(losses.tolist())) == len(losses)


def test_a_run_without_finite_losses_stops():
    class Broken(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) * torch.nan

    module = Broken()
    before = parameters(module)
    with (
        pytest.warns(RuntimeWarning, match="lost every query"),
        pytest.raises(LostQueriesError, match=r"4 batches in a row .* \(max_skipped_steps = 3\)"),
    ):
        fit(module, ForwardOnly(MeZO(seed=0), max_skipped_steps=3))
    assert torch.equal(parameters(module), before)


# -- refusals ----------------------------------------------------------------------------------------------------------


class Manual(Plain):
    automatic_optimization = False


class OwnBackward(Plain):
    def backward(self, loss: Tensor) -> None:
        loss.backward()


class Iterates(Plain):
    def training_step(self, dataloader_iter: Any) -> Any:
        return next(dataloader_iter)


class Searches(Plain):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


class Vector(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.net(batch[0]), batch[1], reduction="none")


class Differentiates(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x = batch[0].requires_grad_()
        (slope,) = torch.autograd.grad(self.net(x).sum(), x)
        return slope.square().mean()


class Frozen(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)


class Stepless(Plain):
    def configure_optimizers(self) -> Any:
        return None


class Hides(Plain):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([*self.parameters(), nn.Parameter(torch.zeros(2))], lr=0.1)


class Lazy(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.lazy = nn.LazyLinear(3)


NOTHING = "has no parameter of the module that requires a gradient: there is nothing to train. Return an optimiser over"


@pytest.mark.filterwarnings("ignore:Lazy modules", "ignore:`LightningModule.configure_optimizers` returned `None`")
@pytest.mark.parametrize(
    ("module", "settings", "message"),
    [
        (Manual, {}, "automatic_optimization = False: Manual calls backward itself"),
        (OwnBackward, {}, "model = 'OwnBackward': has its own backward"),
        (Iterates, {}, "training_step = 'Iterates': takes its batches from dataloader_iter"),
        (Searches, {}, "configure_optimizers = 'LBFGS': does a line search"),
        (Vector, {}, "training_step = 'a tensor of shape (8,)': must return one number"),
        (Lazy, {}, "model = 'lazy.weight': is a lazy parameter without a shape. Run one forward pass"),
        (Differentiates, {}, "training_step = 'Differentiates': differentiates on its own, and autograd is off"),
        (Frozen, {}, f"configure_optimizers = ['SGD']: {NOTHING}"),
        (Stepless, {}, f"configure_optimizers = ['_MockOptimizer']: {NOTHING}"),
        (Hides, {}, "configure_optimizers = '1 tensors': are not parameters of the module, so queries cannot perturb"),
        (Plain, {"precision": "bf16-true"}, "trainer.precision = 'bf16-true': is not supported"),
    ],
)
def test_it_refuses(module, settings, message):
    with pytest.raises(SettingError, match=re.escape(message)):
        fit(module(), forward_only(), **settings)


@pytest.mark.parametrize("first", [False, True])
def test_it_refuses_an_allocator_also_where_a_step_returns_the_losses_of_samples(first):
    class Losses(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            losses = F.cross_entropy(self.net(batch[0]), batch[1], reduction="none")
            return {"loss": losses.mean(), "losses": losses}

    callbacks = [forward_only(), QueryAllocatorCallback(allocator=EqualAllocator())]
    message = (
        "QueryAllocatorCallback': has nothing to allocate beside ForwardOnly: a query runs training_step on a whole"
    )
    with pytest.raises(SettingError, match=message):
        fit(Losses(), *callbacks[:: -1 if first else 1])
    fit(Losses(), forward_only())  # and learns without


def test_it_refuses_other_strategies_and_a_second_module():
    with pytest.raises(SettingError, match=r"ForwardOnly.strategy = 'LikelihoodRatio': needs the loss of each sample"):
        ForwardOnly(LikelihoodRatio())
    with pytest.raises(SettingError, match="Use MeZO, or SPSA or EvolutionStrategies with layout: shared"):
        ForwardOnly(SPSA(layout="factored"))
    callback = forward_only()
    fit(Plain(), callback)
    with pytest.raises(SettingError, match="ForwardOnly = 'Plain': already serves another module"):
        fit(Plain(), callback)
