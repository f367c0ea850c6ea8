"""The study of the paper's Table 2: its commands, which checkpoint is tested, its tables, and a run with two steps."""

import json
import sys
from argparse import Namespace
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("open_clip", reason="prompts are for its models")

from experiments.harness import Cell, Children
from experiments.known_classes import READ, write_split
from experiments.mini_clip import TEMPLATES
from experiments.table2 import BACKBONES, SMALL, best, command_line, complete, evaluations, main, planned
from experiments.table2_report import DATA_SETS, MANUAL, METHODS, OTHERS, PAPER, TRAINED, Key, report, spent
from experiments.tables import read_csv
from flops_lightning.datamodules import Caltech101DataModule
from flops_lightning.datamodules.splits import read_split_file
from flops_lightning.errors import SettingError
from tests.clip_digits import random_clip
from tests.experiments.fakes import entries, finish

ROOT = Path(__file__).parents[2]


def options(output: Path, *given: str) -> Namespace:
    found = command_line().parse(["--output", str(output), *given])
    complete(found)
    return found


def value(cell: Cell, name: str) -> str:
    return cell.arguments[cell.arguments.index(name) + 1]


def test_published_figures_are_copied_without_a_slip() -> None:
    assert {method: round(sum(row), 1) for method, row in PAPER.items()} == {
        "manual": 217.6, "lr": 229.1, "spsa": 223.6, "ops_lr": 238.3, "ops_spsa": 235.0,
    }  # fmt: skip
    assert [round(sum(row), 2) for row in OTHERS.values()] == [240.55, 234.9, 223.9]
    assert {len(row) for row in (*PAPER.values(), *OTHERS.values())} == {len(DATA_SETS)}
    assert PAPER["ops_lr"][DATA_SETS.index("food101")] == 82.7
    assert OTHERS["OpenAI's zero-shot, ensembled", "RN50"][DATA_SETS.index("food101")] == 80.8
    assert set(METHODS) <= {path.stem for path in (ROOT / "configs/prompt_method").glob("*.yaml")}
    assert {path.stem for path in (ROOT / "configs").glob("clip_vit_b32_*.yaml")} == {
        f"clip_vit_b32_{name}" for name in DATA_SETS
    }


def test_a_command_draws_images_and_w_by_the_seed_and_puts_the_methods_file_last(tmp_path: Path) -> None:
    given = ["--data_sets", "food101", "--methods", "spsa", "--seeds", "2", "--only", "food101:a.b=c", "--", "--x=1"]
    fits, tests = planned(options(tmp_path, "--backbones", "vit_b16", *given))
    (cell,) = fits.values()
    assert cell.command == [
        sys.executable, "main.py", "fit", "--config", "configs/clip_vit_b32_food101.yaml",
        "--data.init_args.split_seed", "2", "--model.init_args.text_prompt.seed", "2",
        "--model.init_args.image_prompt.seed", "2", "--model.init_args.model_name", "ViT-B-16-quickgelu",
        "--x=1", "--a.b=c", "--config", "configs/prompt_method/spsa.yaml",
        "--seed_everything", "2", "--trainer.default_root_dir", str(tmp_path / "vit_b16/food101/spsa/seed_2"),
        "--ckpt_path", "last",
    ]  # fmt: skip
    assert (tests, cell.resumes, cell.keeps_weights) == ({}, True, True)


def test_all_cells_come_once_before_the_second_seed_and_manual_ones_where_test_images_differ(tmp_path: Path) -> None:
    fits, tests = planned(options(tmp_path, "--seeds", "1", "2", "1"))
    assert [key.seed for key in fits] == [1] * 18 + [2] * 18
    assert {key.method for key in fits} == set(TRAINED)
    assert len({cell.folder for cell in (*fits.values(), *tests.values())}) == 36 + len(tests)
    assert sorted(key[1:] for key in tests if key.method == "manual") == [
        ("caltech101", "manual", 1), ("caltech101", "manual", 2), ("food101", "manual", 1), ("imagenet", "manual", 1),
    ]  # fmt: skip
    manual = tests[Key("vit_b32", "caltech101", "manual_ensembled", 2)]
    assert manual.arguments[1] == "test"
    assert "--ckpt_path" not in manual.arguments
    assert manual.result == "test.json"


def test_in_small_searches_have_as_many_image_passes_and_words_are_those_of_the_small_clip(tmp_path: Path) -> None:
    fits, tests = planned(options(tmp_path, "--small", "--clip", "DIR", "--root", "DATA", "--seeds", "1"))
    assert {key[:2] for key in fits} == {("mini", "caltech101"), ("mini", "food101")}
    passes = {}
    for key, cell in fits.items():
        assert value(cell, "--model.init_args.model_name") == "local-dir:DIR"
        assert SMALL in cell.arguments
        assert value(cell, "--data.init_args.root") == "DATA"
        split = "--data.init_args.split_file"
        assert (split in cell.arguments) == (key.data_set == "caltech101")
        images = {"caltech101": 4 * 14, "food101": 16 * 10}[key.data_set]
        epochs = int(cell.arguments[-1 - cell.arguments[::-1].index("--trainer.max_epochs") + 1])
        passes[key.data_set, key.method == "cma_es"] = epochs * images * (31 if key.method == "cma_es" else 11)
    assert max(passes.values()) < 1.1 * min(passes.values())
    (ensembled,) = [c for k, c in tests.items() if k[1:3] == ("food101", "manual_ensembled")]
    assert json.loads(value(ensembled, "--model.init_args.template")) == list(TEMPLATES)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--small"], r"--clip = '': is missing. Give the folder of the small CLIP"),
        (["--small", "--clip", "DIR"], r"--root = '': is missing. Give the folder of its images"),
        (["--clip", "DIR"], r"--clip = 'DIR': is where the small CLIP lies, .* not in small. Write --small"),
        (
            ["--small", "--clip", "DIR", "--root", "DATA", "--backbones", "vit_b16"],
            r"--backbones = .*has no effect in small",
        ),
        (
            ["--small", "--clip", "DIR", "--root", "DATA", "--data_sets", "imagenet"],
            r"in small there are caltech101, food101",
        ),
        (["--backbones", "rn50", "--methods", "lr"], r"--backbones = 'rn50': is a ResNet.*--methods manual manual_ens"),
        (["--only", "cifar10:a=b"], r"--only = 'cifar10:a=b': is not DATA_SET:NAME=VALUE"),
    ],
)
def test_options_that_cannot_be_are_refused(given: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=message):
        planned(options(tmp_path, *given))


def test_a_resnet_has_the_manual_rows(tmp_path: Path) -> None:
    fits, tests = planned(options(tmp_path, "--backbones", "rn50", "--seeds", "1"))
    assert fits == {}
    assert {key.method for key in tests} == set(MANUAL)
    assert {value(cell, "--model.init_args.model_name") for cell in tests.values()} == {"RN50-quickgelu"}
    assert set(BACKBONES) == {"vit_b32", "vit_b16", "rn50"}


def trained(cell: Cell, losses: dict[str, float], **summary: Any) -> None:
    """Leave what a run does: a checkpoint for each validation loss, in folders of attempts, and the last one."""
    for name, loss in losses.items():
        folder = cell.folder / f"name/{name}/checkpoints"
        folder.mkdir(parents=True)
        states = {"ModelCheckpoint{}": {"monitor": "val/loss", "current_score": torch.tensor(loss)}, "other": {"a": 1}}
        torch.save({"callbacks": states}, folder / f"epoch=1-step={len(name)}.ckpt")
        (folder / "last.ckpt").write_text("not read")
    finish(cell.folder / "name/version_1", **summary)


def test_the_checkpoint_of_the_lowest_validation_loss_is_tested_also_of_an_earlier_attempt(tmp_path: Path) -> None:
    given = options(tmp_path, "--data_sets", "food101", "--methods", "lr", "bp", "--seeds", "1", "2")
    fits, _ = planned(given)
    cell = fits[Key("vit_b32", "food101", "lr", 1)]
    trained(cell, {"version_0": 0.5, "version_10": 0.7})
    file = cell.folder / "name/version_0/checkpoints/epoch=1-step=9.ckpt"
    assert best(cell) == file
    ((key, test),) = evaluations(fits, tmp_path).items()
    assert key.method == "lr"
    assert value(test, "--ckpt_path") == str(file)
    assert test.arguments[:6] == ("main.py", "test", *cell.arguments[2:6])
    assert test.folder == tmp_path / "test/vit_b32/food101/lr/seed_1"
    file.unlink()
    (cell.folder / "name/version_10/checkpoints/epoch=1-step=10.ckpt").unlink()
    with pytest.raises(SettingError, match=r"holds no weights of vit_b32/food101/lr/seed_1.*Remove that folder"):
        evaluations(fits, tmp_path)


def test_passes_are_queries_and_clean_ones_and_those_of_a_joint_site_are_both() -> None:
    split = {"queries_by_site": {"image_prompt": 640, "scores": 20}, "clean_passes": 64, "steps": 2}
    assert spent(split) == {"image_passes": 704, "text_passes": 22}
    joint = {**split, "queries_by_site": {"image_prompt..scores": 640}, "service": {"calls": 9}}
    assert spent(joint) == {"image_passes": 704, "text_passes": 642, "calls": 9}
    assert spent({**split, "queries_by_site": {}}) == {}


def test_the_report_gives_means_and_deviations_with_passes_and_what_is_missing(tmp_path: Path) -> None:
    given = options(tmp_path, "--data_sets", "caltech101", "--methods", "manual", "lr", "bp", "--seeds", "1", "2")
    fits, tests = planned(given)
    keys = [*tests, *fits]
    finish(tests[Key("vit_b32", "caltech101", "manual", 1)].folder, file="test.json", test_accuracy=0.8, test_loss=2.0)
    for seed in (1, 2):
        sites = {"image_prompt": 1000 * seed, "scores": 10}
        cell = fits[Key("vit_b32", "caltech101", "lr", seed)]
        known = {"queries_by_site": sites, "clean_passes": 100, "steps": 4, "start_accuracy": 0.7 + 0.1 * (seed - 1)}
        trained(cell, {"version_0": 0.5}, **known)
    tests |= evaluations(fits, tmp_path)
    for seed in (1, 2):
        finish(
            tests[Key("vit_b32", "caltech101", "lr", seed)].folder,
            file="test.json",
            test_accuracy=0.88 + 0.02 * seed,
            test_loss=seed / 2,
        )
    assert entries(report(fits, tests, keys, small=False)) == [
        ["method", "backbone", "test accuracy", "test loss", "image passes", "text passes", "calls", "published"],
        ["manual, one template", "vit_b32", "80.0 (1 of 2 seeds)", "2.000", "-", "-", "-", "83.3"],
        ["at the start", "vit_b32", "75.0 ± 7.1", "-", "-", "-", "-", "-"],
        ["LR", "vit_b32", "91.0 ± 1.4", "0.750", "1,600", "14", "-", "87.4"],
        ["BP (upper bound)", "vit_b32", "-", "-", "-", "-", "-", "-"],
        ["BPT-VLM, CMA-ES, best test accuracy seen on the way", "ViT-B/32", "-", "-", "-", "-", "-", "94.16"],
        ["OpenAI's zero-shot, ensembled", "ViT-B/32", "-", "-", "-", "-", "-", "87.6"],
        ["OpenAI's zero-shot, ensembled", "RN50", "-", "-", "-", "-", "-", "83.3"],
    ]


def test_differences_are_those_of_the_same_seeds(tmp_path: Path) -> None:
    given = options(tmp_path, "--data_sets", "food101", "--methods", "lr", "ops_lr", "spsa", "--seeds", "1", "2", "3")
    fits, _ = planned(given)
    for cell in fits.values():
        trained(cell, {"version_0": 0.5}, queries_by_site={})
    tests = evaluations(fits, tmp_path)
    for method, gains in (("lr", (0.0, 0.0, 0.0)), ("ops_lr", (0.01, 0.03)), ("spsa", (-0.02,))):
        for seed, gain in enumerate(gains, start=1):
            cell = tests[Key("vit_b32", "food101", method, seed)]
            # The seeds differ by more than the methods.
            finish(cell.folder, file="test.json", test_accuracy=0.2 * seed + gain, test_loss=seed - gain)
    *_, found = report(fits, tests, list(fits), small=False).split("Differences seed by seed, mean (95 % interval):")
    # Student's t for one degree of freedom is 12.706; the standard error is 1 point.
    assert entries(found) == [
        ["", "backbone", "accuracy, points", "test loss"],
        ["OPS-LR - LR", "vit_b32", "+2.0 (-10.7 to +14.7)", "-0.020 (-0.147 to +0.107)"],
    ]


def test_a_split_of_known_classes_has_eight_images_of_each_that_the_seed_draws(tmp_path: Path) -> None:
    folder = Caltech101DataModule.source.folder(str(tmp_path))
    for name in Caltech101DataModule.class_names:
        (folder / name).mkdir(parents=True)
        for number in range(9):
            (folder / name / f"{number}.jpg").touch()
    assert "leopard" in READ
    splits = []
    for seed in (1, 2):
        write_split(str(tmp_path), tmp_path / "split.json", seed=seed, read={"leopard", "crab", "car"})
        names, parts = read_split_file(str(tmp_path / "split.json"))
        assert names == ("Leopards", "crab")
        assert {part: sorted(each.labels) for part, each in parts.items()} == {
            "train": [0] * 4 + [1] * 4, "val": [0, 1], "test": [0] * 3 + [1] * 3,
        }  # fmt: skip
        files = [file for each in parts.values() for file in each.files]
        assert len({*files}) == 16
        assert all((folder / file).is_file() for file in files)
        splits.append(files)
    assert splits[0] != splits[1]
    for number in range(2):
        (folder / "crab" / f"{number}.jpg").unlink()
    with pytest.raises(SettingError, match=r"--root = .*has 7 images of crab, and a class needs 8"):
        write_split(str(tmp_path), tmp_path / "split.json", seed=1)


@pytest.mark.study
@pytest.mark.usefixtures("forked_runs")
def test_two_steps_are_trained_tested_and_reported_and_nothing_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_data: Callable[[str], Path]
) -> None:
    clip = random_clip(tmp_path / "clip", text={"context_length": 77, "vocab_size": 49408}, image_size=32)
    given = ["--quick", "--clip", clip.partition(":")[2], "--seeds", "1", "--output", str(tmp_path / "study")]
    given += ["--data_sets", "food101", "--methods", "manual", "lr", "cma_es"]
    given += ["--root", str(shared_data("data/food-101").parent), "--"]
    given += [f"--model.init_args.{prompt}.dim=20" for prompt in ("text_prompt", "image_prompt")]
    main(given)
    rows = {row["method"]: row for row in read_csv(tmp_path / "study/table2.csv")}
    assert list(rows) == ["manual", "lr", "cma_es"]
    assert all(0 <= float(row["test_accuracy"]) <= 1 and float(row["test_loss"]) > 0 for row in rows.values())
    assert [rows["lr"][name] for name in ("image_passes", "text_passes")] == [str(2 * 32 * 11), str(2 * 11)]
    assert [rows["cma_es"][name] for name in ("image_passes", "text_passes")] == [str(2 * 32 * 31), str(2 * 31)]
    assert rows["manual"]["image_passes"] == ""
    assert (tmp_path / "study/table2.png").is_file() == bool(find_spec("matplotlib"))
    text = (tmp_path / "study/table2.md").read_text()
    monkeypatch.setattr(Children, "run", lambda *_: pytest.fail("nothing is left to run"))
    main(given)
    assert (tmp_path / "study/table2.md").read_text() == text
