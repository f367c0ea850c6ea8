"""Rows by memory: what a row takes is counted right, what is free is read right, and `auto` survives a resume."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from flops_lightning.errors import SettingError
from flops_lightning.network import memory
from flops_lightning.network.cutting import stage_by_replay
from flops_lightning.network.memory import (
    BESIDE_INFERENCE,
    CPU_CACHE,
    SHARE,
    fitting_rows,
    free_bytes,
    peak_bytes,
    rows_in,
)
from flops_lightning.network.staging import stage_network
from flops_lightning.queries import clean_pass
from flops_lightning.strategies import CoordinateFiniteDifferences, LikelihoodRatio, MeZO
from tests.reference.networks import squared_error

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_the_peak_is_that_of_the_tensors_alive_together():
    x = torch.zeros(1000)

    def run():
        a = x + 1  # 4,000 bytes
        b = torch.cat([a, a, a])  # 16,000 with a
        view = b[10:].view(-1, 10)
        del a, b  # the view keeps the 12,000
        c = view.sum(0)  # 12,040
        del view
        return c.repeat(300)  # 12,040 again

    assert peak_bytes(run) == 16_000
    assert peak_bytes(lambda: x.view(10, 100).t()) == 0
    assert peak_bytes(lambda: x.add_(1)) == 0


def test_a_forward_pass_takes_as_many_bytes_as_its_widest_layer():
    network = nn.Sequential(nn.Linear(10, 200), nn.ReLU(), nn.Linear(200, 10))
    # Input of the ReLU, its output, both of 200 numbers; then output beside the small last layer.
    assert peak_bytes(lambda: network(torch.zeros(3, 10))) == pytest.approx(4 * 3 * 400, abs=4 * 3 * 20)


def test_half_of_the_free_memory_is_filled():
    free, row = 2**34, 2**24
    assert rows_in(free, row) == int(SHARE * free / BESIDE_INFERENCE / row) == 256
    assert fitting_rows(row, CUDA, free=free) == 256  # the power of two below
    assert fitting_rows(row, CPU, free=free) == CPU_CACHE // row == 2
    assert fitting_rows(2**20, CPU, free=2**40) == CPU_CACHE // 2**20
    assert fitting_rows(1, CUDA, free=free) == fitting_rows(1, CUDA, free=None) == memory.MOST_ROWS
    assert fitting_rows(2**40, CUDA, free=free) == 2  # a suffix is smaller than a network: worth a try


def test_the_smaller_of_system_and_container_is_free(tmp_path, monkeypatch):
    places = {"/proc/meminfo": tmp_path / "meminfo", "/sys/fs/cgroup": tmp_path}
    real = memory.Path
    monkeypatch.setattr(memory, "Path", lambda path: places.get(path, real(path)))
    assert free_bytes(CPU) is None
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemFree: 1 kB\nMemAvailable:      64 kB\n")
    assert free_bytes(CPU) == 64 * 1024
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(CPU) == 64 * 1024
    (tmp_path / "memory.max").write_text("3000\n")
    assert free_bytes(CPU) == 2000
    (tmp_path / "memory.stat").write_text("anon 100\ninactive_file 900\n")  # files that were read count as used
    assert free_bytes(CPU) == 2900
    assert free_bytes(torch.device("meta")) is None


SITES = [{"stages": ["0", "1"], "queries_per_sample": 4}, {"stages": ["2"], "queries_per_sample": 4, "name": "top"}]


def bound(strategy):
    torch.manual_seed(0)
    network = stage_network(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)))
    strategy.bind(network, lambda outputs, targets: cross_entropy(outputs, targets, reduction="none"))
    return strategy


BATCH = (torch.ones(3, 6), torch.tensor([0, 1, 2]))


@pytest.mark.parametrize(
    "make",
    [
        lambda rows: LikelihoodRatio(sites=SITES, chunk_rows=rows, seed=0),
        lambda rows: MeZO(chunk_rows=rows, seed=0),
        lambda rows: CoordinateFiniteDifferences(coordinates=3, chunk_rows=rows, seed=0),
    ],
    ids=["likelihood ratio", "MeZO", "coordinates"],
)
def test_auto_is_chosen_at_the_first_batch_and_kept_by_a_resumed_run(make, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 100_000)
    strategy = bound(make("auto"))
    assert strategy.chunk_rows == memory.BEFORE_THE_FIRST_BATCH
    strategy.clean_pass(*BATCH)
    row = peak_bytes(lambda: strategy.network.run(BATCH[0][:1].clone()))
    assert strategy.chunk_rows == fitting_rows(row, CPU, free=100_000) < memory.MOST_ROWS

    richer = bound(make("auto"))
    richer.load_state_dict(strategy.state_dict())
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10**9)
    richer.clean_pass(*BATCH)
    assert richer.chunk_rows == strategy.chunk_rows

    poorer = bound(make("auto"))
    poorer.load_state_dict(strategy.state_dict())
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10_000)
    with pytest.warns(UserWarning, match=r"strategy\.chunk_rows: the resumed run had chunks"):
        poorer.clean_pass(*BATCH)
    assert poorer.chunk_rows == fitting_rows(row, CPU, free=10_000) < strategy.chunk_rows

    given = bound(make(7))
    given.load_state_dict(strategy.state_dict())
    given.clean_pass(*BATCH)
    assert given.chunk_rows == 7
    assert "chunk_rows" not in given.state_dict()


def test_the_copies_of_weights_that_autocast_keeps_belong_to_no_row():
    rows = []
    for half in (False, True):
        wide = stage_network(nn.Sequential(nn.Linear(6, 4000), nn.Tanh(), nn.Linear(4000, 4000)))
        strategy = LikelihoodRatio(sites=SITES, chunk_rows="auto", seed=0)
        strategy.bind(wide, lambda outputs, targets: outputs.square().mean(1))
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            strategy.clean_pass(*BATCH)
        rows.append(strategy.chunk_rows)
    assert rows[0] <= rows[1] <= 2 * rows[0]


@pytest.mark.parametrize("rows", [0, -1, "many", 1.5])
def test_other_rows_are_refused(rows):
    for make in (LikelihoodRatio, MeZO, CoordinateFiniteDifferences):
        with pytest.raises(SettingError, match=r"strategy\.chunk_rows.*must be auto or a number, \d or more.*or auto"):
            make(chunk_rows=rows)


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(200, 200), nn.Tanh()) for _ in range(8)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_a_chain_takes_the_same_memory_by_replay_as_by_its_own_stages():
    module, x, few = Chain(), torch.randn(100, 200), 5_000
    own, replayed = stage_network(module.layers), stage_by_replay(module, x)
    runs = [
        partial(clean_pass, network, squared_error, x, x, keep=(2, 4, 5), draw=0, rows=100)
        for network in (own, replayed)
    ]
    cleans = [peak_bytes(run) for run in runs]
    assert cleans[1] == pytest.approx(cleans[0], abs=few)
    h, rows = (run().activations[2] for run in runs)
    suffixes = [
        peak_bytes(lambda: own.run_suffix(h.clone(), 2)),
        peak_bytes(lambda: replayed.run_suffix(rows.clone(), 2)),
    ]
    assert suffixes[1] == pytest.approx(suffixes[0], abs=few)
    used = rows.clone()
    replayed.run_suffix(used, 2)
    with pytest.raises(StopIteration):  # no zeros in its place
        replayed.run_suffix(used, 2)
