"""The study of the paper's Table 3: its commands, the control that stops backprop, its tables, and a run in small."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.activation_noise import ActivationNoise
from experiments.harness import Cell, Children
from experiments.table3 import KINDS, METHODS, PAPER, Key, command_line, evaluation, main, nearest, report, training
from experiments.tables import read_csv
from flops_lightning.errors import SettingError
from flops_lightning.strategies import Backprop
from tests.cifar10 import noise_images, weights_argument
from tests.digits import classifier, quiet_trainer
from tests.experiments.fakes import ROOT, entries, finish


def planned(output: Path, *given: str) -> dict[Key, Cell]:
    options = command_line().parse(["--output", str(output), "--data_sets", "cifar10", *given])
    return training(options)


def value(cell: Cell, name: str) -> str:
    return cell.arguments[cell.arguments.index(name) + 1]


def test_the_papers_table_is_copied_without_a_slip() -> None:
    sums = {data_set: [round(sum(row), 1) for row in rows.values()] for data_set, rows in PAPER.items()}
    assert sums == {
        "imagenet": [305.0, 320.8, 293.0],
        "food101": [374.2, 407.1, 398.3],
        "cifar100": [328.3, 356.0, 332.2],
    }
    assert sum(len(row) for rows in PAPER.values() for row in rows.values()) == 63
    assert PAPER["food101"]["ops_spsa"][KINDS.index("poisson")] == 70.4
    assert PAPER["imagenet"]["ops_lr"][KINDS.index("fgsm")] == 34.5


def test_controls_are_backprop_with_checkpoints_and_backprop_with_the_noise_of_the_sites(tmp_path: Path) -> None:
    cells = planned(tmp_path, "--small", "--seeds", "1")
    assert list(cells) == [Key("cifar10", m, 1) for m in ("bp", "bp_noise", "ops_lr", "ops_spsa")]
    bp, noise = cells[Key("cifar10", "bp", 1)], cells[Key("cifar10", "bp_noise", 1)]
    assert all(cell.keeps_weights for cell in cells.values())
    assert (value(bp, "--trainer.val_check_interval"), bp.resumes, noise.resumes) == ("5", False, True)
    assert "--trainer.callbacks.every_n_train_steps=5" in bp.arguments
    assert json.loads(value(noise, "--trainer.callbacks.sigma")) == {"blocks.4": 0.03, "blocks.5": 0.03, "head": 0.03}
    assert noise.folder.parent.name == "bp_noise"
    rate = "--model.init_args.optimizer.lr"
    assert [rate in cell.arguments for cell in cells.values()] == [False, False, False, True]
    given = planned(tmp_path, "--small", "--seeds", "1", "--methods", "ops_spsa", "--", rate, "1")
    assert [value(cell, rate) for cell in given.values()] == ["1"]
    assert value(noise, "--trainer.default_root_dir") == str(noise.folder)
    (alone,) = planned(tmp_path, "--methods", "bp", "--seeds", "1").values()
    assert alone.resumes
    assert alone.arguments[3] == "configs/vit_base_cifar10.yaml"
    both = planned(tmp_path, "--methods", "bp_stopped", "--seeds", "1")
    assert [key.method for key in both] == ["bp", "ops_lr"]


class Event:
    def __init__(self, value: float) -> None:
        self.value = value


def trained(folder: Path, accuracies: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave checkpoints and a curve as runs do; backprop's validation accuracies are given, OPS-LR ends at 0.4."""
    curves = {"bp": accuracies, "ops_lr": [0.1, 0.4]}
    monkeypatch.setattr(Cell, "curve", lambda cell, _: [Event(v) for v in curves[cell.folder.parent.name]])
    for method in ("bp", "bp_noise", "ops_lr", "ops_spsa"):
        run = folder / f"vit_micro/cifar10/{method}/seed_0/version_0"
        finish(run)
        (run / "checkpoints").mkdir()
        for step in (5, 10, 15) if method == "bp" else ():
            (run / f"checkpoints/at_step={step}.ckpt").touch()
        (run / "checkpoints/epoch=0-step=18.ckpt").touch()


def test_backprop_stops_at_the_checkpoint_nearest_to_ops_lr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = command_line().parse(["--output", str(tmp_path), "--small", "--seeds", "0", "--data_sets", "cifar10"])
    cells = training(options)
    assert evaluation(options, cells) == {}
    for accuracies, step in (([0.2, 0.37, 0.5], 10), ([0.38, 0.5, 0.6], 5), ([0.1, 0.2, 0.3], 15)):
        trained(tmp_path / str(step), accuracies, monkeypatch)
        options.output = tmp_path / str(step)
        cells = training(options)
        tests = evaluation(options, cells)
        assert [key.method for key in tests] == list(METHODS)
        files = {key.method: Path(value(cell, "--ckpt_path")).name for key, cell in tests.items()}
        assert files.pop("bp_stopped") == f"at_step={step}.ckpt"
        assert set(files.values()) == {"epoch=0-step=18.ckpt"}
        assert (
            nearest(cells[Key("cifar10", "bp", 0)], cells[Key("cifar10", "ops_lr", 0)]).name == f"at_step={step}.ckpt"
        )
    stopped = tests[Key("cifar10", "bp_stopped", 0)]
    assert stopped.arguments[1] == "test"
    assert "configs/small/robustness.yaml" in stopped.arguments
    assert "configs/method/bp.yaml" in stopped.arguments
    assert not any("every_n_train_steps" in argument or argument == "last" for argument in stopped.arguments)
    assert stopped.folder == tmp_path / "15/robustness/vit_micro/cifar10/bp_stopped/seed_0"


def test_finished_runs_without_weights_are_named_with_what_to_do(tmp_path: Path, monkeypatch) -> None:
    trained(tmp_path, [0.2, 0.3, 0.4], monkeypatch)
    for file in tmp_path.glob("vit_micro/cifar10/ops_spsa/**/*.ckpt"):
        file.unlink()
    options = command_line().parse(["--output", str(tmp_path), "--small", "--seeds", "0", "--data_sets", "cifar10"])
    with pytest.raises(SettingError, match=r"holds no weights of cifar10/ops_spsa/seed_0.*Remove these folders"):
        evaluation(options, training(options))


def fake_results(shift: float) -> dict[str, dict[str, float]]:
    strong = {"accuracy": 0.3 + shift, "kept": 0.5 + shift, "drop": 0.3}
    return {"clean": {"accuracy": 0.6 + shift, "kept": 1.0, "drop": 0.0}, "mi_fgsm_8": strong}


def test_the_report_gives_intervals_over_seeds_the_papers_figures_and_paired_differences() -> None:
    seeds = (0.00, 0.02, 0.04)
    results = {Key("cifar100", "bp", i): fake_results(shift) for i, shift in enumerate(seeds)}
    results |= {Key("cifar100", "ops_lr", i): fake_results(shift + 0.01) for i, shift in enumerate(seeds)}
    text = report(results, small=False)
    accuracy, kept, difference, *_ = ["|" + part.split("\n\n")[0] for part in text.split("\n\n|")[1:]]
    # Student's t for two degrees of freedom is 4.303; the standard error is 2 / sqrt(3) points.
    assert entries(accuracy)[2] == ["mi_fgsm_8", "32.0 (27.0 - 37.0)", "33.0 (28.0 - 38.0)", "7.5", "12.3"]
    assert entries(kept)[2] == ["mi_fgsm_8", "52.0 (47.0 - 57.0)", "53.0 (48.0 - 58.0)"]
    assert entries(difference)[1] == ["clean", "+1.0 (+1.0 to +1.0)"]
    assert "paper" not in report({key: results[key] for key in results}, small=True)


def test_noise_in_the_activations_is_met_in_training_and_nowhere_else(tmp_path: Path, digits: Any) -> None:
    wrong = quiet_trainer(ActivationNoise({"blocks.9": 0.1}), max_steps=1, default_root_dir=tmp_path)
    with pytest.raises(SettingError, match=r"sigma = 'blocks.9': the network has no such stage, but embed, blocks.0"):
        wrong.fit(classifier(strategy=Backprop()), digits)
    spread = []
    for sigma in (1e-9, 3.0):
        task = classifier(strategy=Backprop(), optimizer={"lr": 1e-9})
        noise = ActivationNoise({"blocks.1": sigma, "head": sigma})
        trainer = quiet_trainer(noise, max_steps=1, limit_val_batches=0, default_root_dir=tmp_path)
        images = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        before = task.eval()(images).detach()
        trainer.fit(task, digits)
        assert torch.allclose(task.eval()(images), before, atol=1e-4)
        spread.append(float((task.network.run(images) - before).detach().std()))
    assert spread[0] < 1e-3
    assert spread[1] == pytest.approx(3.0, rel=0.2)  # the head's own noise; that of the block adds to it


@pytest.mark.study
@pytest.mark.usefixtures("forked_runs")
def test_a_run_in_small_trains_tests_and_reports_and_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    noise_images(tmp_path, train=6, test=2)
    methods = ["bp", "ops_lr", "bp_stopped", "bp_noise"]  # ops_spsa takes as long as all others
    given = ["--quick", "--seeds", "0", "--every", "1", "--output", str(tmp_path / "study"), "--jobs", "2", "--methods"]
    given += methods
    own = ["--only", f"cifar10:data.init_args.root={tmp_path}"]
    given += [*own, "--", weights_argument(tmp_path)]
    main(given)
    rows = read_csv(tmp_path / "study/table3.csv")
    assert {row["method"] for row in rows} == set(methods)
    assert len(rows) == len(methods) * 15
    assert all(0 <= float(row["accuracy"]) <= 1 for row in rows)
    assert (tmp_path / "study/table3.png").is_file() == bool(find_spec("matplotlib"))
    text = (tmp_path / "study/table3.md").read_text()
    monkeypatch.setattr(Children, "run", lambda *_: pytest.fail("nothing is left to run"))
    main(given)
    assert (tmp_path / "study/table3.md").read_text() == text
