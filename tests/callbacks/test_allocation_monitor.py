import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from flops_lightning.allocators import EqualAllocator, GaussianAllocator, objective
from flops_lightning.allocators.held_back import held_back_ratios, rank_correlation
from flops_lightning.callbacks import QueryAllocatorCallback
from flops_lightning.callbacks.allocation_monitor import (
    IMAGES,
    PICTURES_EVERY,
    SITES_SHOWN,
    allocation_figures,
    count_pictures,
    image_row,
)
from flops_lightning.errors import SettingError
from flops_lightning.protocol import Allocation, QueryBudget, SampleStatistics, TraceObservation
from tests.callbacks.test_query_allocator import Plain
from tests.digits import quiet_trainer

BATCH, STEPS, QUERIES = 6, PICTURES_EVERY + 2, 10


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).exp()


def case(sites: int = 3, batch: int = 7) -> tuple[SampleStatistics, Allocation, TraceObservation]:
    counts = torch.randint(2, 20, (sites, batch), generator=torch.Generator().manual_seed(1))
    queries = torch.full((sites, batch), 4)
    statistics = SampleStatistics(numbers(batch), trace=numbers(sites, batch, seed=2), trace_queries=queries)
    return statistics, Allocation(counts), TraceObservation(numbers(sites, batch, seed=3), counts.float())


# -- figures -----------------------------------------------------------------------------------------------------------


def test_what_sharing_directions_would_do_is_logged_by_site_where_it_is_known() -> None:
    statistics, allocation, observation = case()
    seen = replace(observation, sharing=torch.tensor([0.5, torch.nan, 3.0]))
    figures = allocation_figures(statistics, allocation, seen, ("low", "middle", "high"))
    assert {name: value for name, value in figures.items() if name.startswith("sharing")} == {
        "sharing/low": 0.5, "sharing/high": 3.0,
    }  # fmt: skip


def test_figures_are_means_over_the_sites() -> None:
    statistics, allocation, observation = case()
    weight = torch.rand(3, 7)
    for given in (allocation, replace(allocation, pilot_weight=weight)):
        figures = allocation_figures(statistics, given, observation, ("low", "middle", "high"))
        ratios = held_back_ratios(
            observation, given.counts, pilots=statistics.trace_queries, pilot_weight=given.pilot_weight
        )
        pairs = [rank_correlation(statistics.trace[i], statistics.trace[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
        expected = {
            "J_over_J_equal_seen": ratios.over_equal.mean(),
            **{f"J_over_J_equal_seen/{site}": ratios.over_equal[i] for i, site in enumerate(("low", "middle", "high"))},
            "J_over_J_optimal_seen": ratios.over_optimal.mean(),
            "seen_share": 1.0,
            "loss_trace_correlation": rank_correlation(statistics.loss, observation.trace).mean(),
            "pilot_trace_correlation": rank_correlation(statistics.trace, observation.trace).mean(),
            "pilot_rank_correlation": torch.stack(pairs).mean(),
        }
        assert figures == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-9)


def test_without_pilots_it_is_the_ratio_of_the_objectives_and_pilots_that_are_not_reused_only_cost() -> None:
    statistics, allocation, observation = case(sites=1)
    wasted = allocation_figures(replace(statistics, pilots_reused=False), allocation, observation)
    without = allocation_figures(replace(statistics, trace=None, trace_queries=None), allocation, observation)
    mean = allocation.counts.double().mean()
    expected = objective(observation.trace[0], allocation.counts[0]) / objective(observation.trace[0], mean.expand(7))
    assert without["J_over_J_equal_seen"] == pytest.approx(float(expected), rel=1e-12)
    assert {*without} == {"J_over_J_equal_seen", "J_over_J_optimal_seen", "seen_share", "loss_trace_correlation"}
    ratio = wasted["J_over_J_equal_seen"] / without["J_over_J_equal_seen"]
    assert ratio == pytest.approx(1 + 4 / float(mean), rel=1e-9)


def test_a_module_that_does_not_tell_leaves_what_the_pilots_say_and_many_sites_have_one_figure() -> None:
    statistics, allocation, observation = case()
    told = allocation_figures(statistics, allocation, observation)
    untold = allocation_figures(statistics, allocation, None)
    assert untold == {"pilot_rank_correlation": told["pilot_rank_correlation"]}
    assert allocation_figures(replace(statistics, trace=None, trace_queries=None), allocation, None) == {}
    assert f"J_over_J_equal_seen/{SITES_SHOWN - 1}" in allocation_figures(*case(sites=SITES_SHOWN))
    figures = allocation_figures(*case(sites=SITES_SHOWN + 1))
    assert [name for name in figures if name.startswith("J_over_J_equal_seen")] == ["J_over_J_equal_seen"]


def test_one_pilot_trace_for_all_sites_is_compared_with_each() -> None:
    statistics, allocation, observation = case()
    one = replace(statistics, trace=statistics.trace[0], trace_queries=statistics.trace_queries[0])
    same = replace(statistics, trace=statistics.trace[:1].expand(3, -1))
    expected = allocation_figures(same, allocation, observation)
    assert expected.pop("pilot_rank_correlation") == 1.0
    assert allocation_figures(one, allocation, observation) == expected


def test_sites_without_pilots_take_no_part_in_what_pilots_say() -> None:
    statistics, allocation, observation = case()
    trace = statistics.trace.clone()
    trace[1] = math.nan
    queries = torch.tensor([4, 0, 4])[:, None].expand(3, 7)
    figures = allocation_figures(replace(statistics, trace=trace, trace_queries=queries), allocation, observation)
    assert figures["pilot_rank_correlation"] == pytest.approx(float(rank_correlation(trace[0], trace[2])))
    each = rank_correlation(trace, observation.trace)
    assert figures["pilot_trace_correlation"] == pytest.approx(float(each[[0, 2]].mean()))


def test_traces_not_seen_and_losses_not_finite_take_no_part() -> None:
    statistics, allocation, observation = case()
    trace, loss = observation.trace.clone(), statistics.loss.clone()
    trace[0, :2] = math.nan
    loss[2], loss[5] = math.inf, math.nan
    figures = allocation_figures(replace(statistics, loss=loss), allocation, replace(observation, trace=trace))
    assert figures["seen_share"] == pytest.approx(19 / 21)
    kept = ([3, 4, 6], [0, 1, 3, 4, 6], [0, 1, 3, 4, 6])
    each = [float(rank_correlation(loss[k], trace[i, k])) for i, k in enumerate(kept)]
    assert figures["loss_trace_correlation"] == pytest.approx(sum(each) / 3)


def test_a_figure_that_does_not_exist_is_left_out() -> None:
    statistics, allocation, observation = case()
    nothing = replace(observation, trace=torch.full((3, 7), math.nan))
    assert set(allocation_figures(statistics, allocation, nothing)) == {"seen_share", "pilot_rank_correlation"}
    flat = replace(observation, trace=torch.zeros(3, 7))
    assert set(allocation_figures(statistics, allocation, flat)) == {"seen_share", "pilot_rank_correlation"}
    one = allocation_figures(*case(sites=1, batch=1))
    # One sample gets what there is: this is equal, and the best.
    expected = {"J_over_J_equal_seen": 1.0, "J_over_J_optimal_seen": 1.0, "seen_share": 1.0}
    assert one == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("shape", [(2, 7), (3, 5)])
def test_an_observation_of_another_shape_is_refused(shape: tuple[int, int]) -> None:
    statistics, allocation, _ = case()
    with pytest.raises(SettingError, match=r"trace_observation = .*: does not fit .*Return \(s, b\)"):
        allocation_figures(statistics, allocation, TraceObservation(torch.ones(shape), torch.ones(shape)))


# -- pictures ----------------------------------------------------------------------------------------------------------


def shaded(batch: int, channels: int = 1) -> Tensor:
    """Images of 2 x 2 pixels from 0 to 1, whose second pixel is their index over 100."""
    images = torch.zeros(batch, channels, 2, 2)
    images[:, :, 0, 1], images[:, :, 1, 1] = torch.arange(batch)[:, None] / 100, 1.0
    return images


def shown(picture: Tensor) -> list[int]:
    return (picture[0, 0, 1::4] * 100).round().int().tolist()


def test_pictures_show_the_samples_with_most_and_fewest_queries_in_order() -> None:
    counts = torch.tensor([[3, 9, 1, 4, 5, 2], [0, 0, 0, 0, 0, 9]])
    pictures = count_pictures(counts, (shaded(6), torch.zeros(6)))
    shown_in = {name: shown(picture) for name, picture in pictures.items()}
    assert shown_in == {"most_queries": [5, 1, 4], "fewest_queries": [2, 0, 3]}
    many = count_pictures(torch.arange(40)[None], [shaded(40, channels=3)])
    assert shown(many["most_queries"]) == list(range(39, 39 - IMAGES, -1))
    assert shown(many["fewest_queries"]) == list(range(IMAGES))
    assert many["most_queries"].shape == (3, 2, 4 * IMAGES - 2)


def test_images_are_stretched_to_the_range_of_the_display() -> None:
    images = torch.tensor([[-3.0, 1.0], [5.0, 5.0], [math.nan, 8.0], [0.0, 0.5]]).view(4, 1, 1, 2)
    assert image_row(images)[0, 0].tolist() == [0, 1, *(0, 0), 0, 0, *(0, 0), 0, 1, *(0, 0), 0, 1]
    channels = torch.tensor([[[[10.0]], [[30.0]], [[15.0]]]])
    assert image_row(channels).flatten().tolist() == [0.0, 1.0, 0.25]
    assert image_row(torch.tensor([[[[0, 255]]]], dtype=torch.uint8)).flatten().tolist() == [0.0, 1.0]


def test_there_are_no_pictures_of_other_batches_or_of_counts_that_are_alike() -> None:
    others = ([torch.zeros(3, 5)], [shaded(3, channels=2)], [shaded(4)], ["images"])
    for batch in (None, {"images": shaded(3)}, [], shaded(3), *others):
        assert count_pictures(torch.tensor([[1, 2, 3]]), batch) == {}
    assert count_pictures(torch.full((2, 4), 5), (shaded(4),)) == {}
    assert count_pictures(torch.tensor([[7]]), (shaded(1),)) == {}


# -- in a run ----------------------------------------------------------------------------------------------------------


class Module(Plain):
    """Trains on images, with two sites whose traces it makes up, and remembers what passed through its hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.statistics: list[SampleStatistics] = []
        self.counts: list[Tensor] = []
        self.seen: list[TraceObservation] = []
        self.parameters_used: list[dict[str, float]] = []

    def sample_statistics(self, batch: list[Tensor]) -> SampleStatistics:
        loss = self.layer(batch[0].flatten(1))[:, 0].square()
        trace = torch.stack([loss.tanh() + 0.1, loss + 0.1])
        budget = QueryBudget((QUERIES, QUERIES), sites=("lower", "upper"))
        self.statistics.append(SampleStatistics(loss, batch[0].flatten(1), trace, budget=budget))
        return self.statistics[-1]

    def set_query_counts(self, counts: Tensor) -> None:
        self.counts.append(counts)

    def trace_observation(self) -> TraceObservation:
        self.seen.append(TraceObservation(numbers(2, BATCH, seed=len(self.seen)), self.counts[-1].float()))
        return self.seen[-1]

    def training_step(self, batch: list[Tensor]) -> None:
        super().training_step(batch)
        (callback,) = self.trainer.callbacks
        if isinstance(callback.allocator, GaussianAllocator):
            self.parameters_used.append(dict(vars(callback.allocator.parameters)))


def fit(folder: Path, *, allocator: Any = None, images: Tensor | None = None, every: int = 1) -> Module:
    module, images = Module(), numbers(BATCH * STEPS, 1, 2, 2) if images is None else images
    callback = QueryAllocatorCallback(allocator=allocator or EqualAllocator())
    trainer = quiet_trainer(callback, logger=TensorBoardLogger(folder), log_every_n_steps=every)
    trainer.fit(module, DataLoader(TensorDataset(images), batch_size=BATCH))
    return module


def events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    guidance = {"scalars": 0, "histograms": 0, "images": 0}
    (file,) = folder.rglob("events.out.tfevents.*")
    return EventAccumulator(str(file), size_guidance=guidance).Reload()


def test_figures_counts_and_pictures_arrive_in_tensorboard(tmp_path: Path) -> None:
    module = fit(tmp_path, allocator=GaussianAllocator())
    log = events(tmp_path)
    front = {tag for tag in log.Tags()["scalars"] if tag.startswith("allocation/")}
    names = ("J_over_J_equal", "J_over_J_equal_seen", "J_over_J_optimal_seen", "count_min", "count_max")
    assert front == {f"allocation/{name}" for name in names}
    for name in ("beta0", "beta1", "sigma", "gamma"):
        logged = [event.value for event in log.Scalars(f"allocation_details/{name}")]
        assert logged == pytest.approx([values[name] for values in module.parameters_used], rel=1e-6)
        assert len(logged) == STEPS
    for i, (known, counts, seen) in enumerate(zip(module.statistics, module.counts, module.seen, strict=True)):
        for name, value in allocation_figures(known, Allocation(counts), seen, ("lower", "upper")).items():
            page = "allocation" if f"allocation/{name}" in front else "allocation_details"
            assert log.Scalars(f"{page}/{name}")[i].value == pytest.approx(value, rel=1e-5)
    for site, name in enumerate(("lower", "upper")):
        histograms = log.Histograms(f"counts/{name}")
        assert [event.step for event in histograms] == list(range(1, STEPS + 1))
        for event, counts in zip(histograms, module.counts, strict=True):
            drawn = event.histogram_value
            assert (drawn.num, drawn.sum) == (BATCH, QUERIES * BATCH)
            assert (drawn.min, drawn.max) == (int(counts[site].min()), int(counts[site].max()))
    for name in ("most_queries", "fewest_queries"):
        pictures = log.Images(f"allocation/{name}")
        assert [picture.step for picture in pictures] == [1, 1 + PICTURES_EVERY]
        assert {(picture.height, picture.width) for picture in pictures} == {(2, 3 * 2 + 2 * 2)}


def test_only_steps_that_are_logged_are_watched_and_only_images_are_drawn(tmp_path: Path) -> None:
    fit(tmp_path, allocator=GaussianAllocator(), images=numbers(BATCH * 10, 4), every=5)
    log = events(tmp_path)
    assert [event.step for event in log.Histograms("counts/lower")] == [5, 10]
    assert len(log.Scalars("allocation/J_over_J_equal_seen")) == 2
    assert log.Tags()["images"] == []


def test_only_the_first_process_shows_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pl.Trainer, "is_global_zero", False)
    fit(tmp_path)
    assert events(tmp_path).Tags()["histograms"] == []
