"""The reference step is the same estimator, the yardsticks run the rows they claim, and ratios are what they say."""

import json
import math
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from benchmarks import speed
from benchmarks.__main__ import main, report
from benchmarks.cases import PILOTS, Case, vit
from benchmarks.harness import CPU, Spread, Timings, alternate, plain, table
from benchmarks.reference import Reference
from benchmarks.speed import full_rows, infer, record, set_up, suffix_rows
from flops_lightning.errors import SettingError
from flops_lightning.network.staging import Stage, StagedNetwork, stage_network
from flops_lightning.objectives import cross_entropy
from flops_lightning.phases import PHASES
from flops_lightning.strategies import LikelihoodRatio, SiteSpec

RATIOS = {"full_inference", "suffix_inference", "backprop", "checkpointed_backprop", "reference", "batched_reference"}
MEASURED = [*(f"ratio_{name}" for name in RATIOS), "overhead_fraction"]
MEMORY = dict.fromkeys(("memory_over_inference", "memory_with_vjp_over_inference", "memory_over_backprop"))
KEYS = {
    "model": str, "batch": int, "queries": int, "allocation": str, "compiled": bool, "strategy": str, "layout": str,
    "sites": str, "device": str, **dict.fromkeys(MEASURED, float), **dict.fromkeys(MEMORY, type(None)),
    "seconds_by_phase": dict, "quartiles": dict, "rounds": int, "chunk_rows": int, "dtype": str, "threads": int,
    "processor": str, "versions": dict,
}  # fmt: skip


def layers() -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 5)
    )


def small_vit() -> nn.Module:
    model = vit(img_size=4, patch_size=2, embed_dim=8, depth=3, num_heads=2, num_classes=5)
    for parameter in model.parameters():  # timm starts biases at 0 and norms at 1
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


MICRO = Case("layers", layers, (3, 2, 2), 5, batch=3, queries=4, chunk_rows=5, rounds=2)


@pytest.mark.parametrize(
    ("build", "stages", "kind"),
    [
        (small_vit, [["embed", "blocks.0"], ["blocks.1", "blocks.2"], ["pool", "head"]], "group"),
        (small_vit, [["embed", "head"]], "block"),
        (layers, [["0", "3"], ["4", "6"]], "group"),
    ],
)
def test_the_reference_step_gives_the_estimate_of_likelihood_ratio(build, stages, kind):
    torch.manual_seed(1)
    network = stage_network(build().double())
    inputs = torch.randn(4, *((3, 2, 2) if build is layers else (3, 4, 4)), dtype=torch.float64)
    targets = torch.randint(5, (4,))
    strategy = LikelihoodRatio(sites=[SiteSpec(stages=s, kind=kind) for s in stages], chunk_rows=7, seed=3)
    strategy.bind(network, cross_entropy)
    counts = torch.tensor([[4, 1, 9, 2]]).repeat(len(strategy.sites), 1)
    counts[0] = torch.tensor([1, 3, 2, 6])
    strategy.clean_pass(inputs, targets)  # so that the draw counter is not where it starts
    clean = strategy.clean_pass(inputs, targets)
    strategy.estimate(clean, counts)
    reference = Reference(network, cross_entropy, strategy.sites, inputs, targets, counts, 3, clean.draw)
    batched = reference.batched(rows=5)
    ours = {name: parameter.grad for name, parameter in network.module.named_parameters()}
    assert batched.keys() == ours.keys()
    torch.testing.assert_close(ours, batched, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(reference.literal(), batched, rtol=1e-8, atol=1e-10)
    assert all(gradient.abs().max() > 1e-4 for gradient in batched.values())


def test_the_reference_step_refuses_linear_sites():
    strategy = LikelihoodRatio(sites=[SiteSpec(stages=["0", "6"], kind="linear")])
    strategy.bind(stage_network(layers()), cross_entropy)
    empty = torch.zeros(1)
    with pytest.raises(SettingError, match="kind: block"):
        Reference(strategy.network, cross_entropy, strategy.sites, empty, empty, empty, 0, 0)


def rows_by_stage(network: StagedNetwork) -> tuple[StagedNetwork, dict[str, list[tuple[int, ...]]]]:
    """The network with stages that note the shapes they are given."""
    seen: dict[str, list[tuple[int, ...]]] = {stage.name: [] for stage in network.stages}

    def noting(stage: Stage) -> Stage:
        return replace(stage, run=lambda x: (seen[stage.name].append(tuple(x.shape)), stage.run(x))[1])

    return StagedNetwork(network.module, tuple(noting(stage) for stage in network.stages)), seen


def test_the_yardsticks_run_as_many_rows_as_the_step_has_queries():
    network, seen = rows_by_stage(stage_network(small_vit()))
    queries = {6: ["embed", "blocks.0"], 8: ["blocks.1", "blocks.2"], 2: ["pool", "head"]}
    specs = [SiteSpec(stages=stages, queries_per_sample=n, sigma=0.1) for n, stages in queries.items()]
    strategy = LikelihoodRatio(sites=specs, chunk_rows=8, seed=0)
    strategy.bind(network, cross_entropy)
    inputs = torch.randn(3, 3, 4, 4)
    clean = strategy.clean_pass(inputs, torch.zeros(3, dtype=torch.int64))

    def rows(run):
        for shapes in seen.values():
            shapes.clear()
        run()
        return {name: sum(shape[0] for shape in shapes) for name, shapes in seen.items()}

    full = rows(partial(infer, network, full_rows(strategy.sites, inputs, 8)))
    assert full == dict.fromkeys(full, 3 * (6 + 8 + 2))
    assert max(shape[0] for shape in seen["embed"]) <= 8

    suffix = rows(partial(infer, network, suffix_rows(strategy.sites, clean, 8)))
    assert suffix == {"embed": 0, "blocks.0": 0, "blocks.1": 18, "blocks.2": 18, "pool": 42, "head": 42}
    # Of the last block the CLS token alone is computed, so that is all that the pool is given.
    assert {shape[1] for shape in seen["pool"]} == {1}

    alone = {name: Counter(shapes) for name, shapes in seen.items()}
    rows(lambda: strategy.estimate(clean))
    step = {name: Counter(shapes) for name, shapes in seen.items()}
    # The step makes the same calls; beyond them only its local VJP, which runs each stage once on the batch.
    assert all(sum((step[name] - alone[name]).values()) == 2 for name in ("embed", "blocks.0"))
    # Samples whose graph is held at a time: 8 rows over twice the two blocks of the site.
    assert all(step[name] - alone[name] == Counter({(2, 5, 8): 1, (1, 5, 8): 1}) for name in ("blocks.1", "blocks.2"))
    assert step["pool"] - alone["pool"] == Counter({(2, 1, 8): 1, (1, 1, 8): 1})
    assert all(not alone[name] - step[name] for name in alone)


def test_alternate_pairs_contenders_within_rounds():
    now, ran, waits = [0.0], [], []

    def contender(name: str, seconds: float) -> None:
        # The machine slows down by half from one round to the next; the first round is the warm-up.
        now[0] += seconds * 1.5 ** (len(ran) // 3)
        ran.append(name)

    runs = {name: partial(contender, name, seconds) for name, seconds in (("a", 1.0), ("b", 2.0), ("c", 4.0))}
    timings = alternate(runs, rounds=4, clock=lambda: now[0], synchronize=lambda: waits.append(now[0]))
    assert ["".join(ran[i : i + 3]) for i in range(0, 15, 3)] == ["abc", "abc", "bca", "cab", "abc"]
    assert timings.seconds["a"] == pytest.approx([1.5, 1.5**2, 1.5**3, 1.5**4])
    assert len(waits) == 2 * 3 * 4
    for other, ratio in (("b", 2.0), ("c", 4.0)):
        assert timings.ratio(other, "a") == Spread(*[pytest.approx(ratio)] * 3)
    with pytest.raises(SettingError, match="rounds = 0: must be 1 or more"):
        alternate({"a": lambda: None}, rounds=0)


def test_ratios_are_medians_and_quartiles_of_the_rounds_in_tables_and_records():
    timings = Timings({"ours": (1.0, 2.0, 4.0, 1.0, 2.0), "other": (1.0, 4.0, 12.0, 4.0, 10.0)})
    ratio = timings.ratio("other", "ours")  # 1, 2, 3, 4, 5
    assert ratio == Spread(3.0, 2.0, 4.0)
    excess = timings.excess("other", "ours")  # 0, 1/2, 2/3, 3/4, 4/5
    assert (excess.low, excess.median, excess.high) == pytest.approx((1 / 2, 2 / 3, 3 / 4))
    assert Spread.of([1, 2, 7], tails=0) == Spread(2, 1, 7)
    entry = {"name": "a", "ratio": ratio, "nothing": None}
    assert plain(entry) == {"name": "a", "ratio": 3.0, "nothing": None, "quartiles": {"ratio": [2.0, 4.0]}}
    columns = {"of": "{name}", "speed": "{ratio:.1f}", "other": "{nothing:.1f}"}
    header, _, line = table(columns, [entry]).splitlines()
    assert [cell.strip() for cell in header.split("|")] == ["", "of", "speed", "other", ""]
    assert [cell.strip() for cell in line.split("|")] == ["", "a", "3.0 (2.0 - 4.0)", "-", ""]


def test_a_record_divides_what_its_keys_say():
    seconds = {
        "step": 5, "queries of the step": 4, "full inference": 15, "suffix inference": 3, "backprop": 1,
        "checkpointed backprop": 2, "reference": 40, "batched reference": 20,
    }  # fmt: skip
    entry = record(set_up(MICRO, CPU), Timings({name: (s, s) for name, s in seconds.items()}))
    assert {name: entry[name].median for name in MEASURED} == pytest.approx({
        "ratio_full_inference": 3, "ratio_suffix_inference": 0.75, "ratio_backprop": 0.2, "overhead_fraction": 0.4,
        "ratio_checkpointed_backprop": 0.4, "ratio_reference": 8, "ratio_batched_reference": 4,
    })  # fmt: skip


def test_the_command_writes_records_and_prints_the_table(tmp_path, capsys):
    cases = [replace(MICRO, model="left out"), MICRO, replace(MICRO, model="layers again", batch=2)]
    main(["--models", "layers", "--rounds", "3", "--json", str(tmp_path / "records.json")], cases=cases)
    records = json.loads((tmp_path / "records.json").read_text())
    measured = [(r["model"], r["batch"], r["queries"], r["rounds"]) for r in records]
    assert measured == [("layers", 3, 4, 3), ("layers again", 2, 4, 3)]
    printed = capsys.readouterr().out
    assert "no local VJP" in printed
    for entry in records:
        assert {name: type(value) for name, value in entry.items()} == KEYS
        assert (entry["strategy"], entry["sites"]) == ("LikelihoodRatio (baseline)", "group1 group2 group3 head")
        assert entry["quartiles"].keys() == set(MEASURED)
        (line,) = [line for line in printed.splitlines() if line.split("|")[1:2] == [f" {entry['model']:<12} "]]
        for name in MEASURED:
            low, high = entry["quartiles"][name]
            assert low <= entry[name] <= high
            assert f"{entry[name]:.2f} (" in line
            assert 0 < entry[name] < math.inf or (name == "overhead_fraction" and entry[name] <= 0)
        phases = entry["seconds_by_phase"]
        assert phases.keys() == {*PHASES, "rest"}
        assert min(phases[name] for name in ("clean pass", "suffix", "local VJP", "optimiser")) > 0
        assert phases["pilots"] == phases["allocation"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json", "no/such/folder/records.json"], "Give a file in a folder that exists."),
        (["--device", "abacus"], "argument --device: 'abacus' cannot be used"),
        (["--rounds", "0"], "argument --rounds: '0' must be a whole number of 1 or more."),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_measured(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments, cases=[MICRO])
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_case_with_an_allocator_takes_pilots_and_chooses_counts():
    setup = set_up(replace(MICRO, queries=8, allocation="gaussian"), CPU)
    seconds = speed.seconds_by_phase(setup, lambda: None)
    assert seconds["pilots"] > 0 < seconds["allocation"]
    meter = setup.strategy.meter.sites
    pilots = {name: spent.pilots for name, spent in meter.items() if name != "clean"}
    assert pilots == {"group1": 0, "group2": 0, "group3": 2 * 3 * PILOTS, "head": 0}  # two steps of three samples
    assert {name: meter[name].queries for name in pilots} == dict.fromkeys(pilots, 2 * 3 * 8)


ALL = set(MEASURED)
OWN = ALL - {"ratio_reference", "ratio_batched_reference"}


@pytest.mark.parametrize(
    ("way", "measured"),
    [
        ({"kind": "block"}, ALL),
        ({"strategy": "SPSA"}, OWN),
        ({"references": False}, OWN),
        ({"suffixes_only": True}, {"ratio_suffix_inference"}),
    ],
)
def test_other_strategies_sites_and_yardsticks_are_measured_too(way, measured):
    case = replace(MICRO, build=small_vit, image=(3, 4, 4), **way)
    setup = set_up(case, CPU)
    entry = record(setup, alternate(speed.contenders(setup), rounds=1)) | MEMORY
    spsa, block = "strategy" in way, "kind" in way
    assert entry["strategy"] == ("SPSA (antithetic)" if spsa else "LikelihoodRatio (baseline)")
    assert entry["layout"] == ("factored" if spsa else "activations")
    assert entry["sites"] == ("block" if block else "group1 group2 group3 head")
    assert {name for name in MEASURED if entry[name] is not None} == measured
    assert entry["ratio_suffix_inference"].median > 0
    assert [cell.strip() for cell in report([entry]).splitlines()[2].split("|")].count("-") == 10 - len(measured)
