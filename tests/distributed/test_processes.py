"""Several processes on the CPU give what the same ranks give one after the other in one process."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flops_lightning.allocators import EqualAllocator
from tests.digits import quiet_trainer
from tests.distributed.scenarios import SCENARIOS, SUMMARISED, make_task, save_model, simulate, texts_to_test
from tests.distributed.worker import MIDDLE
from tests.processes import run_module

pytestmark = pytest.mark.timeout(900)  # the first test waits for all processes
QUICK = ["lr_gaussian", "spsa_losses", "zo_muon", "accumulated", "backprop"]
"""Run by two processes also where slow tests are left out."""
OF_FOUR = ["lr_gaussian", "spsa_losses", "one_rank_lost"]
LEARNED_TOGETHER = ("lr_learned_widths", "coordinates", "lr_budget")
"""Here ranks share what they learn, which ranks one after the other would not."""
STEPS = {"accumulated": 3, "all_ranks_lost": 5}  # of others 6: a batch that only one rank loses is a step of all
GROUPS = [(2, QUICK), (2, [name for name in SCENARIOS if name not in QUICK]), (4, OF_FOUR)]
RUNS = [
    pytest.param(size, name, marks=() if names is QUICK else pytest.mark.slow)
    for size, names in GROUPS
    for name in names
]


class Runs:
    """Results of scenarios, one for each rank, by number of processes and name; a group runs when it is asked for."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self.factory = factory
        self.found: dict[tuple[int, str], list[dict[str, Any]]] = {}

    def __getitem__(self, run: tuple[int, str]) -> list[dict[str, Any]]:
        if run not in self.found:
            (names,) = (names for size, names in GROUPS if size == run[0] and run[1] in names)
            folder = self.factory.mktemp("processes")
            if any(SCENARIOS[name].language for name in names):
                save_model(folder / "model")  # before the processes look for it
            run_module(run[0], "tests.distributed.worker", str(run[0]), str(folder), *names, seconds=800)
            for name in names:
                self.found[run[0], name] = [torch.load(folder / f"{name}-{rank}.pt") for rank in range(run[0])]
                for rank, found in enumerate(self.found[run[0], name]):
                    found["exported"] = folder / f"{name}-adapter-{rank}"
            if SUMMARISED in names:
                for rank in self.found[run[0], SUMMARISED]:
                    rank["summary"] = json.loads((folder / "summary.json").read_text())
        return self.found[run]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory)


@pytest.mark.parametrize(("world_size", "name"), [run for run in RUNS if run.values[1] not in LEARNED_TOGETHER])
def test_processes_equal_the_same_ranks_one_after_the_other(runs, world_size, name, tmp_path):
    expected, counts = simulate(name, world_size, tmp_path)
    found = runs[world_size, name]
    # Norms of a Llama compute in float32.
    near = {"rtol": 1e-5, "atol": 1e-7} if SCENARIOS[name].language else {"rtol": 1e-9, "atol": 1e-11}
    for key, value in expected.items():
        assert torch.allclose(found[0]["parameters"][key], value, **near), key
    for step, table in enumerate(counts):
        assert torch.equal(torch.cat([rank["counts"][step] for rank in found], dim=1), table)
    start = dict(make_task(name, tmp_path).network.module.named_parameters())
    assert any(not torch.equal(start[key], value) for key, value in expected.items()), "nothing was learned"


@pytest.mark.parametrize(("world_size", "name"), RUNS)
def test_replicas_are_bit_identical_and_learn_alike(runs, world_size, name):
    first, *others = runs[world_size, name]
    assert bool(flat(first["learned"])) is (name in LEARNED_TOGETHER)
    assert first["steps"] == STEPS.get(name, 6)
    for other in others:
        assert all(torch.equal(first["parameters"][key], value) for key, value in other["parameters"].items())
        assert (first["steps"], flat(first["learned"])) == (other["steps"], flat(other["learned"]))


def flat(state: Any, path: str = "") -> dict[str, Any]:
    """The numbers of nested dictionaries, by path."""
    if isinstance(state, dict):
        return {key: value for k, v in state.items() for key, value in flat(v, f"{path}/{k}").items()}
    return {path: state.tolist() if isinstance(state, torch.Tensor) else state}


DRAWN = ("lr_drawn", "lr_budget")
"""Here chance decides how many samples of a rank have queries."""


@pytest.mark.parametrize(
    ("world_size", "name"),
    [run for run in RUNS if SCENARIOS[run.values[1]].allocator and run.values[1] not in DRAWN],
)
def test_every_rank_spends_the_share_of_its_samples(runs, world_size, name):
    uneven = any(len(table.unique()) > 2 for table in runs[world_size, name][0]["counts"])
    assert uneven is (SCENARIOS[name].allocator is not EqualAllocator)
    for tables in zip(*(rank["counts"] for rank in runs[world_size, name]), strict=True):
        averages = [table.double().mean(dim=1) for table in tables]
        for average in averages:
            # Whole multiples: a rank's total is off its share by less than one pair.
            assert ((average - averages[0]).abs() < 2 / min(table.shape[1] for table in tables)).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SCENARIOS if SCENARIOS[name].language])
def test_a_language_model_is_resumed_with_the_same_bits_saved_once_and_tested_on_each_text_once(runs, name, tmp_path):
    (alone,) = quiet_trainer(precision="64-true").test(make_task(name, tmp_path), texts_to_test(), verbose=False)
    for rank in runs[2, name]:
        assert rank["tested"] == pytest.approx(alone, rel=1e-6)
        assert all(torch.equal(rank["resumed"][key], value) for key, value in rank["parameters"].items())
        assert all(torch.equal(*tables) for tables in zip(rank["later"], rank["counts"][MIDDLE:], strict=True))
    first, second = (rank["exported"] for rank in runs[2, name])
    assert not second.exists()
    saved = load_file(first / ("adapter_model.safetensors" if "lora" in name else "model.safetensors"))
    own = {
        key.replace(".default", ""): value
        for key, value in runs[2, name][0]["parameters"].items()
        if "lora_" in key or "lora" not in name
    }
    assert saved.keys() == {f"base_model.model.{key}" if "lora" in name else key for key in own}
    assert all(torch.equal(saved[f"base_model.model.{key}" if "lora" in name else key], own[key]) for key in own)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["spsa", "mezo"])
def test_exchanging_losses_equals_exchanging_gradients(runs, kind):
    gradients, losses = runs[2, f"{kind}_gradients"][0], runs[2, f"{kind}_losses"][0]
    for key, value in gradients["parameters"].items():
        assert torch.allclose(losses["parameters"][key], value, rtol=1e-9, atol=1e-11), key


def test_bytes_of_a_step_with_gradients_are_those_of_the_parameters_and_a_short_header(runs, tmp_path):
    parameters = [p for p in make_task("backprop", tmp_path).network.module.parameters() if p.requires_grad]
    header = 8 * (1 + len(parameters))
    for rank in runs[2, "backprop"]:
        assert rank["sent"] == [header + sum(8 * p.numel() for p in parameters)] * 6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("narrow", "wide"), [("spsa_losses_equal", "spsa_losses_wide"), ("mezo_losses", "mezo_losses_wide")]
)
def test_bytes_of_a_step_with_losses_do_not_depend_on_the_number_of_parameters(runs, narrow, wide):
    assert runs[2, narrow][0]["sent"] == runs[2, wide][0]["sent"]
    assert max(runs[2, narrow][0]["sent"]) <= 200


@pytest.mark.parametrize(
    ("world_size", "samples"), [(2, 5 * 10 + 5), pytest.param(4, 5 * 20 + 9, marks=pytest.mark.slow)]
)
def test_the_summary_counts_what_all_processes_did(runs, world_size, samples):
    summary = runs[world_size, SUMMARISED][0]["summary"]
    assert (summary["samples"], summary["queries"], summary["steps"]) == (samples, 16 * samples, 6)
