"""The GPU's benchmark on a CPU: every part answers, a failing one is noted, time is kept; and it needs little."""

import json
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_memory, gpu_parts, gpu_runs, gpu_speed
from flops_lightning.phases import phase, timed_phases
from tests.cifar10 import noise_images

CPU = torch.device("cpu")
QUICK = gpu.Plan(CPU, quick=True)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the command writes of every part: JSON and Markdown."""
    folder = tmp_path_factory.mktemp("gpu")
    files = folder / "gpu.json", folder / "gpu.md"
    given = [str(part) for pair in zip(("--json", "--markdown"), files, strict=True) for part in pair]
    parts = [part for part in gpu.PARTS if part != "processes"]  # starting them takes longest
    gpu.main(["--device", "cpu", "--quick", "--minutes", "20", "--parts", *parts, *given])
    return json.loads(files[0].read_text()), files[1].read_text()


def test_every_part_answers_in_the_order_of_value(found):
    records = found[0]["records"]
    parts = [part for part in gpu.PARTS if part != "processes"]
    assert list(dict.fromkeys(record["part"] for record in records)) == parts
    assert not [record for record in records if "failed" in record]
    assert found[0]["place"]["quick"] is True


def test_a_cpu_agrees_with_itself_and_the_slope_is_one(found):
    signs, normals, gradient, slope = (r for r in found[0]["records"] if r["part"] == "agreement")
    assert signs["largest difference"] == normals["largest difference"] == gradient["relative difference"] == 0.0
    assert slope["slope"] == pytest.approx(1, abs=4 * slope["standard error"])
    assert slope["standard error"] < 0.1
    assert all(goal["met"] for record in (signs, normals, gradient, slope) for goal in record["goals"])


def test_steps_have_a_line_each_with_shares_that_add_up(found):
    timed = [record for record in found[0]["records"] if "step seconds" in record]
    left_out = [record for record in found[0]["records"] if "speed" in record["part"] and "left out" in record]
    assert len(timed) + len(left_out) == len(gpu_speed.FIRST) + len(gpu_speed.OTHERS)
    assert {(r["precision"], r["allocation"]) for r in timed} >= {
        ("bfloat16", "equal"), ("float32", "equal"), ("TF32", "equal"), ("bfloat16", "gaussian"),
    }  # fmt: skip
    for record in timed:
        assert record["images a second"] == pytest.approx(record["batch"] / record["step seconds"])
        assert sum(record["shares"].values()) == pytest.approx(1)
        assert record["chunk rows"] >= 2
    assert found[1].count("\n| tiny, for ") == len(timed)


def test_goals_are_shown_beside_what_was_measured():
    goals = [gpu_parts.goal("speed", 2.5, least=3.0), gpu_parts.goal("share", 0.011, most=0.02)]
    assert [goal["met"] for goal in goals] == [False, True]
    text = gpu.report([{"part": "speed", "model": "ViT", "goals": goals, "other": 1.23456}], {"device": "a GPU"})
    assert "| speed >= 3 | speed, ViT | 2.5 | **no** |\n| share <= 0.02 | speed, ViT | 0.011 | yes |" in text
    assert "- speed: model ViT, other 1.23" in text
    assert not gpu_parts.goal("difference", float("nan"), most=1.0)["met"]


def test_a_part_that_fails_is_noted_and_the_next_begins():
    def broken(_):
        yield {"value": 1}
        raise RuntimeError("CUDA error: misaligned address\nmore")

    def part(_):
        yield {"value": 2}

    written = []
    records = gpu.measure(
        QUICK, {"first": broken, "second": part}, minutes=1, write=lambda found: written.append(len(found))
    )
    assert [(r["part"], r.get("value", r.get("failed"))) for r in records] == [
        ("first", 1), ("first", "RuntimeError: CUDA error: misaligned address"), ("second", 2),
    ]  # fmt: skip
    assert records[1]["at"].startswith("test_gpu.py:")
    assert written == [1, 2, 3]


def test_what_runs_when_the_minutes_are_over_is_cut_off():
    def part(_):
        yield {"value": 1}
        try:
            time.sleep(60)
        except Exception:
            pytest.fail("an `except Exception` on the way must not keep the end")
        yield {"value": 2}

    start = time.monotonic()
    records = gpu.measure(QUICK, {"first": part, "second": part}, minutes=0.5 / 60, write=lambda _: None)
    assert time.monotonic() - start < 10
    assert [record["part"] for record in records] == ["first", "cut off"]
    assert records[-1] == {"part": "cut off", "left": ["first", "second"]}
    time.sleep(0.6)  # no alarm is left behind


BLOCKED = """
import sys
sys.modules.update(dict.fromkeys({names}))  # importing one of them fails now
from benchmarks import gpu
gpu.main(["--device", "cpu", "--quick", "--parts", "waiting", "memory", "fits"])
"""


@pytest.mark.slow
def test_it_takes_no_command_line_parser_no_loaders_and_no_tables():
    names = ["jsonargparse", "tabulate", "torchdata", "sklearn", "open_clip", "httpx", "cma", "tensorboard", "peft"]
    command = [sys.executable, "-c", BLOCKED.format(names=names)]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert not answer.returncode, answer.stderr
    assert "- fits: largest" in answer.stdout
    assert "failed" not in answer.stdout


@pytest.mark.study
def test_the_whole_command_trains_on_images_and_in_two_processes(tmp_path, capsys):
    noise_images(tmp_path / "cifar10", train=3, test=2)
    out = tmp_path / "gpu.json"
    gpu.main(["--device", "cpu", "--quick", "--cifar10", str(tmp_path / "cifar10"), "--json", str(out)])
    records = json.loads(out.read_text())["records"]
    assert list(dict.fromkeys(record["part"] for record in records)) == list(gpu.PARTS)
    (trained,) = (record for record in records if record["part"] == "training")
    assert trained["steps"] >= 1
    assert all(0 <= accuracy <= 1 for accuracy in trained["accuracy before and after"])
    (together,) = (record for record in records if record["part"] == "processes")
    assert len(together["step seconds of each"]) == 2
    assert all(goal["met"] for goal in together["goals"])


def test_images_come_from_folders_by_class_and_a_folder_without_them_is_refused(tmp_path, capsys):
    noise_images(tmp_path, train=3, test=2)
    x, y = gpu_runs.images(tmp_path, "train", 2)
    assert x.shape == (20, 3, 32, 32)
    assert y.tolist() == [label for label in range(10) for _ in range(2)]
    whole, _ = gpu_runs.images(tmp_path, "train", 9)
    pixels = whole * torch.tensor(gpu_runs.PIXELS[1]).view(3, 1, 1) + torch.tensor(gpu_runs.PIXELS[0]).view(3, 1, 1)
    assert float(pixels.min()) == pytest.approx(0, abs=1e-6)
    assert float(pixels.max()) == pytest.approx(1, abs=1e-6)
    with pytest.raises(SystemExit):
        gpu.main(["--cifar10", str(tmp_path / "nowhere")])
    assert "has neither cifar-10-batches-py/ nor train/ in it" in capsys.readouterr().err


def test_time_between_marks_is_that_of_the_innermost_phase():
    ticks = iter(range(0, 1000, 10))

    class Mark:
        def __init__(self):
            self.at = next(ticks)

        def elapsed_time(self, end):
            return end.at - self.at

    clock = gpu_speed.EventClock(mark=Mark)
    with timed_phases(clock=clock), phase("suffix"), phase("noise"):  # marks at 0, 10, 20 and 30 ms
        pass
    assert clock.read() == pytest.approx({"suffix": 0.02, "noise": 0.01})


def test_hours_of_table_1_are_those_of_its_configuration():
    """``configs/vit_large_imagenet.yaml``: ten epochs, 10,000 images kept to validate; 1,000 images a second."""
    assert gpu_speed.hours(1000.0) == pytest.approx(10 * 1_271_167 / 1000 / 3600)


def test_what_the_device_cannot_hold_is_left_behind(monkeypatch):
    sizes = {"vit_base_patch16_224": 1, "vit_large_patch16_224": 2, "vit_huge_patch14_224": 3}

    def holds(case, device, what):
        return sizes.get(case.model, 9) <= {"step": 3, "backprop": 1}[what]

    monkeypatch.setattr(gpu_memory, "holds", holds)
    *tried, largest = gpu_memory.fits(gpu.Plan(CPU, quick=False))
    assert [record["fit"] for record in tried] == [["step", "backprop"], ["step"], ["step"], []]
    assert largest == {"largest": {"step": "vit_huge_patch14_224", "backprop": "vit_base_patch16_224"}}


def test_running_out_of_memory_is_an_answer(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("no more")

    assert gpu_memory.holds(gpu_parts.SMALL, CPU, "step")
    monkeypatch.setattr(gpu_memory, "step", full)
    assert not gpu_memory.holds(gpu_parts.SMALL, CPU, "step")


def test_waits_are_counted_by_line():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    ((place, number),) = gpu_parts.places_of(caught).items()
    assert number == 2
    assert place.startswith("tests/benchmarks/test_gpu.py:")
