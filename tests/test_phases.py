"""Phases add up what happens in them, each moment once, and appear under torch's profiler."""

import time

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile

from flops_lightning.allocators import GaussianAllocator
from flops_lightning.network.staging import stage_network
from flops_lightning.phases import PHASES, PhaseClock, phase, timed_phases
from flops_lightning.strategies import SPSA, LikelihoodRatio, MeZO

SITES = [
    {"name": "lower", "stages": ["0", "1"], "sigma": 0.05, "queries_per_sample": 8},
    {"name": "upper", "stages": ["2", "3"], "sigma": 0.05, "queries_per_sample": 8},
]


def test_a_moment_counts_for_the_innermost_phase_and_all_of_a_pilot_is_pilot():
    waits, times = [], iter([0.0, 1.0, 3.0, 10.0, 20.0, 40.0, 50.0, 100.0])
    clock = PhaseClock(synchronize=lambda: waits.append(1), clock=lambda: next(times))
    clock.enter("allocation")  # 0
    clock.enter("clean pass")  # 1: allocation 1
    clock.leave()  # 3: clean pass 2
    clock.enter("pilots")  # 10: allocation 7
    clock.enter("noise")  # 20: pilots 10
    clock.leave()  # 40: pilots 20
    clock.leave()  # 50: pilots 10
    clock.leave()  # 100: allocation 50
    assert clock.seconds == {"allocation": 58.0, "clean pass": 2.0, "pilots": 40.0}
    assert len(waits) == 8


def test_a_phase_ends_when_the_work_in_it_fails_and_nothing_is_counted_once_nobody_asks():
    with timed_phases() as seconds, phase("allocation"):
        with pytest.raises(ValueError, match="lost"), phase("noise"):
            raise ValueError("lost")
        time.sleep(0.02)
    with phase("suffix"):
        pass
    assert seconds["allocation"] > 0.02 > seconds["noise"]
    assert seconds.keys() == {"allocation", "noise"}


def bound(strategy):
    torch.manual_seed(0)
    network = stage_network(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 4)))
    strategy.bind(network, lambda outputs, targets: cross_entropy(outputs, targets, reduction="none"))
    return strategy


QUERIES = {"clean pass", "noise", "suffix", "accumulation"}


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (LikelihoodRatio(sites=SITES, pilots={"sites": "upper", "queries": 2}, chunk_rows=8, seed=0),
         {*QUERIES, "pilots", "local VJP"}),
        (SPSA(sites=SITES, layout="factored", chunk_rows=8, seed=0), QUERIES),
        (SPSA(sites=SITES, layout="shared", chunk_rows=8, seed=0), QUERIES),
        (MeZO(chunk_rows=8, seed=0), QUERIES - {"clean pass"}),
    ],
    ids=["likelihood ratio", "factored", "shared", "MeZO"],
)  # fmt: skip
def test_a_step_is_made_of_its_phases(strategy, expected):
    bound(strategy)
    inputs, targets = torch.randn(5, 6), torch.randint(4, (5,))
    with timed_phases() as seconds:
        start = time.perf_counter()
        clean = strategy.clean_pass(inputs, targets)
        if isinstance(strategy, LikelihoodRatio):
            strategy.sample_statistics(clean, GaussianAllocator().requests)
        strategy.estimate(clean)
        whole = time.perf_counter() - start
    assert seconds.keys() == expected <= set(PHASES)
    assert 0 < sum(seconds.values()) <= whole


def test_the_profiler_shows_the_phases():
    strategy = bound(LikelihoodRatio(sites=SITES, chunk_rows=20, seed=0))
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        strategy.estimate(strategy.clean_pass(torch.randn(5, 6), torch.randint(4, (5,))))
    ranges = {event.key: event.count for event in profiler.key_averages() if event.key.startswith("flops_lightning/")}
    each_chunk = {f"flops_lightning/{name}": 4 for name in ("noise", "suffix")}  # two at each site
    mean = {"flops_lightning/accumulation": 4 + 2}  # the sums of a site's chunks, and the mean of its queries
    assert ranges == {"flops_lightning/clean pass": 1, **each_chunk, **mean, "flops_lightning/local VJP": 2}
