"""What a run writes to TensorBoard, read from its event file."""

import re
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from flops_lightning.allocators import CostAwareAllocator, GaussianAllocator
from flops_lightning.callbacks import QueryAllocatorCallback
from flops_lightning.datamodules import DigitsDataModule
from flops_lightning.strategies import PilotSpec
from flops_lightning.tasks import OptimizerSettings
from flops_lightning.tensorboard import CHARTS, run_card
from tests.callbacks.test_allocation_monitor import events
from tests.digits import classifier, quiet_trainer, two_sites


@pytest.fixture(scope="module")
def log(tmp_path_factory: Any) -> Any:
    folder = tmp_path_factory.mktemp("run")
    task = classifier(
        strategy=two_sites(queries=8, pilots=PilotSpec(sites="head", queries=2)),
        optimizer=OptimizerSettings(lr=1e-3, schedule="cosine", layer_decay=0.5),
    )
    callback, limits = QueryAllocatorCallback(allocator=GaussianAllocator(min_queries=2)), {"limit_train_batches": 3}
    trainer = quiet_trainer(callback, logger=TensorBoardLogger(folder), log_every_n_steps=1, **limits)
    trainer.fit(task, DigitsDataModule(batch_size=32))
    return events(folder)


def test_sites_have_their_names_and_few_cards_come_first(log):
    tags = log.Tags()
    assert tags["histograms"] == ["counts/body", "counts/head"]
    assert {"queries/body", "queries/head", "allocation_details/J_over_J_equal_seen/body"} <= set(tags["scalars"])
    assert not [tag for tag in tags["scalars"] if re.search(r"(site|/)\d", tag)]
    assert len([tag for tag in tags["scalars"] if tag.startswith("allocation/")]) == 5


def test_the_learning_rate_is_a_curve_without_a_callback(log):
    rates = [event.value for event in log.Scalars("train/lr")]
    assert rates == pytest.approx([1e-3, 0.75e-3, 0.25e-3])


def test_the_run_card_shows_budget_and_settings(log):
    (event,) = log.Tensors("run/text_summary")
    card = event.tensor_proto.string_val[0].decode()
    assert card.startswith("| site | queries per sample |\n|---|---|\n| body | 8 |\n| head | 6 |")
    for line in ("| optimizer.lr | 0.001 |", "| allocator.min_queries | 2 |", "| strategy | LikelihoodRatio |"):
        assert line in card.split("\n")


def test_the_custom_scalars_page_has_the_four_charts(log):
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    (event,) = log.Tensors("custom_scalars__config__")
    (category,) = Layout.FromString(event.tensor_proto.string_val[0]).category
    charts = {chart.title: list(chart.multiline.tag) for chart in category.chart}
    assert charts == CHARTS
    curves = [{tag for tag in log.Tags()["scalars"] if re.match("|".join(charts[title]), tag)} for title in charts]
    assert curves == [
        {"train/loss", "train/accuracy", "val/loss", "val/accuracy"},
        {f"allocation/J_over_J_{name}" for name in ("equal", "equal_seen", "optimal_seen")},
        {"allocation/count_min", "allocation/count_max"},
        {"queries/total", "queries/forward_equivalents"},
    ]


def test_other_loggers_get_curves_only(make_task, make_trainer, digits, tmp_path):
    callback = QueryAllocatorCallback(allocator=CostAwareAllocator())
    make_trainer(callback, logger=CSVLogger(tmp_path), log_every_n_steps=1).fit(make_task(), digits)
    (file,) = tmp_path.rglob("metrics.csv")
    columns = set(file.read_text().splitlines()[0].split(","))
    assert {"train/lr", "allocation/J_over_J_own", "allocation_details/queries/body"} <= columns
    assert not [name for name in columns if name.startswith(("run", "counts"))]


def test_a_value_of_several_lines_stays_one_row_of_the_card():
    assert run_card({"freeze": "a\nb"}).endswith("| freeze | a b |")
