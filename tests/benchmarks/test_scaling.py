"""The count is the meter's, the networks are as stated, and ratios and exponents are what they say."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import scaling
from benchmarks.harness import CPU, Spread, Timings
from benchmarks.scaling import BASE, SWEEPS, Point
from benchmarks.speed import Setup, forward_equivalents, set_up, step

TINY = Point(batch=2, queries=4, depth=3, width=32, groups=3, image=16)


def at(point: Point = TINY, **changed: int) -> Setup:
    return set_up(replace(point, **changed).case(), CPU)


def power_law(sweep: str, values: tuple[int, ...], power: float) -> Timings:
    """Two rounds of a machine that is half as fast in the second; inference always takes a tenth of the base step."""
    seconds = {}
    for value in values:
        factor = (value / getattr(TINY, sweep)) ** power
        seconds[f"{scaling.STEP} {value}"] = (factor, 2 * factor)
        seconds[f"{scaling.INFERENCE} {value}"] = (0.1, 0.2)
    return Timings(seconds)


def test_sweeps_ascend_through_the_base_point_and_every_network_has_the_stated_depth_and_width():
    for sweep, values in SWEEPS.items():
        assert getattr(BASE, sweep) in values
        assert list(values) == sorted(set(values))
        for point in (replace(BASE, **{sweep: value}) for value in values):
            with torch.device("meta"):
                vit = point.case().build()
            assert len(vit.blocks) == point.depth
            assert vit.embed_dim == point.width == vit.norm.normalized_shape[0]
            assert vit.patch_embed.num_patches + vit.num_prefix_tokens == 65
            assert vit.blocks[0].attn.head_dim == (64 if point.width >= 128 else point.width)


@pytest.mark.parametrize("groups", SWEEPS["groups"])
def test_groups_are_of_equal_depth_and_every_site_has_the_queries(groups):
    setup = at(depth=6, groups=groups)
    *body, head = setup.strategy.sites
    names = [stage.name for stage in setup.network.stages]
    blocks = [sum(name.startswith("blocks.") for name in names[site.first : site.last + 1]) for site in body]
    assert blocks == [6 // groups] * groups
    assert names[head.first : head.last + 1] == ["pool", "head"]
    assert {site.queries_per_sample for site in setup.strategy.sites} == {4}


@pytest.mark.parametrize("point", [TINY, replace(TINY, depth=6, groups=2, queries=7, batch=3)], ids=str)
def test_the_count_is_what_the_meter_counts(point):
    setup = at(point)
    counted = forward_equivalents(setup.strategy, setup.inputs)
    for _ in range(2):
        step(setup)
    assert setup.strategy.meter.total().forward_equivalents == pytest.approx(2 * point.batch * counted)


def test_the_flops_are_those_of_a_vit_whose_last_block_runs_at_the_class_token():
    patches, d, depth = 4, 32, 3
    tokens = patches + 1
    block = 24 * tokens * d**2 + 4 * tokens**2 * d
    last = 6 * tokens * d**2 + 4 * tokens * d + (2 + 16) * d**2
    expected = 2 * patches * 3 * 64 * d + (depth - 1) * block + last + 2 * d * 10
    assert scaling.forward_flops(at()) == expected


@pytest.mark.parametrize("power", [0.5, 2.0])
def test_the_exponent_is_the_power_of_the_upper_half(power):
    for sizes in ((2, 4), (2, 3, 6), (3, 6, 12, 24)):
        assert scaling.exponent(sizes, [7 * size**power for size in sizes]) == pytest.approx(power)
    assert scaling.exponent((1, 2, 4, 8, 16), [99, 98, 4, 8, 16]) == pytest.approx(1)


def test_ratios_are_taken_within_rounds():
    values = (2, 4, 8)
    setups = {value: at(queries=value) for value in values}
    found = scaling.records("queries", setups, power_law("queries", values, 1.5), base=TINY)
    assert [record["queries"] for record in found] == [2, 4, 8]
    for record, over_base in zip(found, (0.5**1.5, 1, 2**1.5), strict=True):
        assert record["step_over_base"].median == pytest.approx(over_base)
        assert record["step_over_inference"].median == pytest.approx(10 * over_base)
        assert record["exponent"] == Spread(*[pytest.approx(1.5)] * 3)  # the slow round does not show
        counted = record["measured_over_counted"] * record["forward_equivalents"]
        assert counted == pytest.approx(record["step_over_inference"].median)
    found = scaling.records("batch", {b: at(batch=b) for b in (1, 2)}, power_law("batch", (1, 2), 1.0), base=TINY)
    assert [record["predicted_over_base"] for record in found] == pytest.approx([0.5, 1])
    assert found[0]["predicted_exponent"] == pytest.approx(1)


def test_the_base_point_is_one_and_the_records_say_where_they_were_made(tmp_path, capsys):
    file = tmp_path / "records.json"
    sweeps = {"queries": (2, 4), "depth": (3, 6)}
    scaling.main(["--only", "depth", "--rounds", "2", "--json", str(file)], base=TINY, sweeps=sweeps)
    text = capsys.readouterr().out
    line = next(line for line in text.splitlines() if line.startswith("| depth "))
    assert [cell.strip() for cell in line.split("|")[1:6]] == ["depth", "3", "1.00 (1.00 - 1.00)", "1.00", "1.00"]
    base, deeper = json.loads(file.read_text())
    assert (base["depth"], deeper["depth"]) == (3, 6)
    assert base["step_over_base"] == base["predicted_over_base"] == base["measured_over_predicted"] == 1
    # The suffixes of a deeper network of as many groups cost about as much, the forward pass twice as much.
    assert 1.8 < deeper["predicted_over_base"] < 2.7
    assert (deeper["device"], deeper["dtype"], deeper["threads"]) == ("cpu", "float32", torch.get_num_threads())
    assert torch.__version__.startswith(deeper["versions"]["torch"])
    assert deeper["rounds"] == 2
