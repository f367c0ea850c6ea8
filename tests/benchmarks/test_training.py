"""Steps of real training are split by phase, and the share of allocator and callback is what the clock says."""

from argparse import Namespace

import pytest

from benchmarks.harness import CPU
from benchmarks.training import CONTENDERS, StepClock, main, record, report, train
from flops_lightning.phases import PHASES

SMALL = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 4, "num_heads": 2}
NOTHING = dict.fromkeys(PHASES, 0.0)


def test_steps_are_the_differences_of_looks(monkeypatch):
    times = iter([10.0, 13.0, 17.0])
    monkeypatch.setattr("benchmarks.training.time.perf_counter", lambda: next(times))
    seconds: dict[str, float] = {}
    clock = StepClock(seconds, lambda: None)
    clock.on_train_batch_start()
    seconds |= {"suffix": 2.0}
    clock.on_train_batch_start()
    seconds |= {"suffix": 5.0, "allocation": 0.5}
    clock.on_train_batch_start()
    assert clock.steps == [
        NOTHING | {"step": 3.0, "suffix": 2.0},
        NOTHING | {"step": 4.0, "suffix": 3.0, "allocation": 0.5},
    ]


def test_a_record_leaves_the_pilots_out_of_the_step_that_it_divides_by():
    steps = [NOTHING | {"step": 10.0, "pilots": 2.0, "allocation": a, "suffix": 5.0} for a in (0.8, 0.4, 1.6)]
    entry = record("gaussian", steps)
    assert entry["allocation_share"] == pytest.approx(0.1)
    assert entry["allocation_share_worst"] == pytest.approx(0.2)
    assert entry["shares"]["rest"] == pytest.approx(1 - (2 + 0.8 + 5) / 10)
    assert report([entry]).splitlines()[-1].split("|")[-2].strip() == "10.00% (20.00%)"


@pytest.mark.parametrize("name", ["equal", "gaussian, pilots"])
@pytest.mark.filterwarnings("ignore")
def test_a_training_run_has_all_its_phases(name):
    options = Namespace(model="vit_tiny_patch16_224", batch=4, queries=8, chunk_rows=16, steps=3, device=CPU)
    steps = train(name, options, **SMALL)
    assert len(steps) == 3
    for step in steps:
        missing = {phase for phase in PHASES if not step[phase]}
        assert missing == (set() if CONTENDERS[name][1] else {"pilots"})
        assert 0 < sum(step[phase] for phase in PHASES) < step["step"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--queries", "4"], "argument --queries: '4' must be a whole number of 6 or more."),
        (["--model", "resnet18", "--names", "equal"], "batch normalisation ties"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err.splitlines()[-1]
