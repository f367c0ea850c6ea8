import json
import subprocess
import sys
from collections.abc import Iterator

import pytest
import timm
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset, IterableDataset

from flops_lightning.allocators import EqualAllocator
from flops_lightning.callbacks import QueryAllocatorCallback, RunSummary
from flops_lightning.callbacks.run_summary import _share
from flops_lightning.datamodules import DigitsDataModule
from flops_lightning.distributed import Communicator
from flops_lightning.errors import SettingError
from flops_lightning.strategies import Backprop, CoordinateFiniteDifferences, LikelihoodRatio, MeZO
from flops_lightning.tasks import ForwardModule
from tests.digits import MODEL, TINY, classifier


def accuracy(model: torch.nn.Module, data: DigitsDataModule) -> float:
    data.setup("test")
    with torch.no_grad():
        hits = [(model.eval()(images).argmax(1) == labels) for images, labels in data.test_dataloader()]
    model.train()
    return float(torch.cat(hits).float().mean())


@pytest.fixture
def run(make_trainer, digits, tmp_path):
    """Train a task and read its summary."""

    def run(strategy=None, *callbacks, data=digits, **settings):
        task = classifier(**({} if strategy is None else {"strategy": strategy}))
        make_trainer(*callbacks, RunSummary(), limit_val_batches=0, **settings).fit(task, data)
        return task, json.loads((tmp_path / "summary.json").read_text())

    return run


def test_summary_says_what_happened_and_exports_timms_weights(run, digits, tmp_path):
    task, summary = run(None, QueryAllocatorCallback(allocator=EqualAllocator()))
    assert {"peak_memory_mb", "peak_memory_of", "seed"} <= set(summary)
    assert summary["start_accuracy"] == pytest.approx(accuracy(classifier(), digits))
    assert summary["test_accuracy"] == pytest.approx(accuracy(task, digits))
    assert summary["queries"] == 3 * 32 * 8
    assert summary["queries_per_sample"] == 8
    assert (summary["steps"], summary["samples"]) == (3, 3 * 32)
    assert summary["queries_by_site"] == {"body": 3 * 32 * 4, "head": 3 * 32 * 4}
    assert summary["forward_equivalents"] == pytest.approx(task.strategy.meter.total().forward_equivalents, abs=0.1)
    assert summary["lost_queries"] == 0
    assert (summary["strategy"], summary["allocator"]) == ("LikelihoodRatio", "EqualAllocator")
    assert 0 < summary["train_seconds"] < 60
    plain = timm.create_model(MODEL["model_name"], num_classes=10, **TINY)
    plain.load_state_dict(load_file(tmp_path / "model.safetensors"))
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(plain.eval()(x), task.eval()(x))


@pytest.mark.parametrize(
    ("strategy", "by_site", "batches"),
    [
        (MeZO(queries=2), {"all": 2}, 1.0),  # makes no clean pass; a whole epoch ends with a smaller batch
        (CoordinateFiniteDifferences(coordinates=5, ratios="uniform"), {"coordinates": 5}, 3),  # has no sites
        (Backprop(), {}, 3),
    ],
)
def test_queries_of_a_sample_are_counted_by_samples_whatever_the_strategy_runs(run, strategy, by_site, batches, digits):
    _, summary = run(strategy, limit_train_batches=batches)
    samples = len(digits.train_set) if batches == 1.0 else 3 * 32
    assert summary["samples"] == samples
    assert summary["queries_per_sample"] == sum(by_site.values())
    assert summary["queries_by_site"] == {site: queries * samples for site, queries in by_site.items()}


def test_the_memory_of_a_process_is_that_of_its_high_water_mark():
    code = (
        "import torch; from flops_lightning.network.memory import peak_memory as peak\n"
        "cpu = torch.device('cpu'); before = peak(cpu)[0]; held = torch.ones(2**26); full = peak(cpu)[0]\n"
        "del held; print(before, full, peak(cpu)[0], peak(cpu)[1])"
    )
    # Started from a process that holds more: what the parent once held is not the child's.
    held = torch.ones(2**27)
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    del held
    before, full, after, where = answer.stdout.split()
    assert where == "process"
    assert float(full) - float(before) == pytest.approx(256, abs=8)  # 2^26 float32
    assert float(after) == pytest.approx(float(full), abs=8)
    assert float(before) > 100  # torch itself


def test_export_can_be_turned_off_and_training_is_unchanged_by_the_tests(make_task, make_trainer, digits, tmp_path):
    with_summary, without = make_task(), make_task()
    make_trainer(RunSummary(export_weights=False)).fit(with_summary, digits)
    make_trainer().fit(without, digits)
    assert not (tmp_path / "model.safetensors").exists()
    pairs = zip(with_summary.parameters(), without.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("streamed", [False, True])
def test_ranks_share_the_test_images_and_each_reads_its_own(streamed):
    read: list[int] = []

    class Images(Dataset[int]):
        def __len__(self) -> int:
            return 11

        def __getitem__(self, place: int) -> int:
            read.append(place)
            return place

    class Stream(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(11))

    def rank(number: int) -> Communicator:
        ranks = Communicator()
        ranks.rank, ranks.size = number, 3
        return ranks

    loader = DataLoader(Stream() if streamed else Images(), batch_size=2)
    shares = [torch.cat([*_share(loader, rank(number)), torch.empty(0)]).tolist() for number in range(3)]
    assert sorted(place for share in shares for place in share) == list(range(11))
    assert max(map(len, shares)) - min(map(len, shares)) <= 2
    assert sorted(read) == ([] if streamed else list(range(11)))


def test_a_network_is_tested_in_double_precision_too(run):
    assert 0 <= run(precision="64-true")[1]["test_accuracy"] <= 1


def test_without_a_data_module_accuracies_are_unknown(run, digits):
    digits.setup("fit")
    _, summary = run(data=digits.train_dataloader())
    assert summary["start_accuracy"] is summary["test_accuracy"] is None
    assert summary["queries"] == 3 * 32 * 8


def test_a_task_of_ones_own_has_its_validation_and_its_tensors(make_trainer, tmp_path):
    class Regression(ForwardModule):
        def __init__(self) -> None:
            super().__init__(strategy=LikelihoodRatio(seed=0))
            self.net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
            self.stage(self.net)

        def loss(self, outputs, targets):
            return (outputs - targets).square().sum(dim=1)

        def validation_step(self, batch, batch_idx):
            self.log("val/loss", self.loss(self(batch[0]), batch[1]).mean())

    rows = [(torch.randn(2), torch.randn(1)) for _ in range(6)]
    task, loader = Regression(), DataLoader(rows, batch_size=4)
    trainer = make_trainer(RunSummary(), max_epochs=2, limit_train_batches=1.0)
    trainer.fit(task, loader, loader)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["samples"], summary["test_accuracy"]) == (12, None)
    assert summary["validation"] == {"loss": pytest.approx(float(trainer.callback_metrics["val/loss"]))}
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == task.network.trainable().keys()
    assert all(torch.equal(written[name], p) for name, p in task.network.trainable().items())


def test_a_module_without_queries_is_refused(make_trainer):
    with pytest.raises(SettingError, match=r"trainer.callbacks = 'RunSummary': BoringModel is not a ForwardModule"):
        make_trainer(RunSummary()).fit(BoringModel())


def test_a_trial_run_leaves_nothing_behind(make_task, make_trainer, digits, tmp_path):
    make_trainer(RunSummary(), fast_dev_run=True).fit(make_task(), digits)
    assert list(tmp_path.iterdir()) == []
