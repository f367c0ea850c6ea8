"""The study of the paper's Table 1: its commands, what it repeats and what not, and its tables."""

import sys
from pathlib import Path

import pytest

from experiments.harness import Cell, Children, run_all
from experiments.table1 import (
    DATA_SETS,
    FILES,
    METHODS,
    PAPER,
    ROWS,
    SMALL,
    cells,
    command_line,
    entry,
    main,
    published,
)
from experiments.tables import read_csv
from flops_lightning.callbacks import QueryAllocatorCallback
from flops_lightning.cli.command import build
from tests.cifar10 import noise_images, weights_argument
from tests.experiments.fakes import entries, finish

QUERIES = "--model.init_args.strategy.init_args.queries=100"


def value(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


class Machine:
    """Stands for what runs a command: notes its method and seed, and leaves behind what a run would."""

    def __init__(self) -> None:
        self.ran: list[tuple[str, int]] = []
        self.failing: set[str] = set()

    def __call__(self, command: list[str]) -> int:
        folder, seed = Path(value(command, "--trainer.default_root_dir")), int(value(command, "--seed_everything"))
        self.ran.append((folder.parent.name, seed))
        if folder.parent.name in self.failing:
            return 3
        version = folder / "name" / "version_0"
        finish(version, test_accuracy=0.5 + 0.02 * seed, steps=7, queries=560)
        (version / "last.ckpt").touch()
        return 0


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    fake = Machine()
    monkeypatch.setattr(Children, "run", lambda _, command, *__: fake(command))
    return fake


def study(output: Path, *extra: str, methods: tuple[str, ...] = ("bp", "lr")) -> list[str]:
    return ["--models", "vit_base", "--data_sets", "cifar10", "--methods", *methods, "--output", str(output), *extra]


def test_the_papers_table_is_copied_without_a_slip() -> None:
    sums = {
        "vit_base": [637.5, 246.8, 523.2, 524.8, 568.3, 576.2, 605.9],
        "vit_large": [647.7, 261.5, 532.6, 534.5, 575.4, 589.0, 616.0],
    }
    assert {model: [round(sum(row), 1) for row in rows.values()] for model, rows in PAPER.items()} == sums
    assert {tuple(rows) for rows in PAPER.values()} == {tuple(ROWS)}
    assert {len(row) for rows in PAPER.values() for row in rows.values()} == {len(DATA_SETS)} == {7}
    assert published("vit_base", "ops_lr", "cifar10") == 93.2
    assert published("vit_large", "mezo", "imagenet") == 10.7
    assert published("vit_large", "lr", "eurosat") == 85.7
    assert published("vit_base", "ops_lr_optimal", "cifar10") is None
    assert set(FILES) == set(METHODS)


def planned(*given: str) -> list[Cell]:
    return list(cells(command_line().parse(given)).values())


def test_a_command_puts_the_methods_files_on_top_of_all_others(tmp_path: Path) -> None:
    given = study(tmp_path, "--seeds", "2", "--small", "--", "--trainer.max_epochs=1", methods=("ops_spsa",))
    (cell,) = planned(*given)
    assert cell.command == [
        sys.executable, "main.py", "fit", "--config", "configs/vit_base_cifar10.yaml",
        "--config", SMALL, "--trainer.max_epochs=1",
        "--config", "configs/method/ops_spsa.yaml", "--config", "configs/allocators/gaussian.yaml",
        "--seed_everything", "2", "--trainer.default_root_dir", str(tmp_path / "vit_base/cifar10/ops_spsa/seed_2"),
        "--ckpt_path", "last",
    ]  # fmt: skip


def test_cells_have_folders_of_their_own_and_all_come_once_before_the_second_seed(tmp_path: Path) -> None:
    found = cells(command_line().parse(["--output", str(tmp_path), "--seeds", "0", "1", "0"]))
    assert len(found) == len({cell.folder for cell in found.values()}) == 2 * 2 * 7 * 7
    assert [key.seed for key in found] == [0] * 98 + [1] * 98
    assert {key.method for key in found} == set(ROWS)
    # Five sites get as many queries in all as for the other methods.
    more = [(key.model, key.method) for key, cell in found.items() if QUERIES in cell.command]
    assert set(more) == {("vit_large", "mezo_nspsa")}


def test_settings_of_one_data_set_reach_its_runs_alone(tmp_path: Path) -> None:
    only = ["--only", "cifar10:data.init_args.root=/a", "cifar10:data.init_args.download=true", "eurosat:data.x=b:c=d"]
    sets = ["--models", "vit_base", "--methods", "ops_lr", "--data_sets", "cifar10", "cifar100", "eurosat"]
    found = planned(*sets, "--output", str(tmp_path), *only, "--", "--x=1")
    assert [cell.command[5 : cell.command.index("--seed_everything")] for cell in found] == [
        ["--x=1", "--data.init_args.root=/a", "--data.init_args.download=true"], ["--x=1"], ["--x=1", "--data.x=b:c=d"],
    ]  # fmt: skip


@pytest.mark.parametrize("wrong", ["mnist:data.root=a", "cifar10:data.root", "cifar10", "cifar10:=a", "data.root=a"])
def test_a_wrong_only_is_told(wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(study(tmp_path, "--only", wrong))
    assert f"--only = '{wrong}': is not DATA_SET:NAME=VALUE" in capsys.readouterr().err


def test_a_finished_cell_is_not_run_again_and_a_failed_one_stops_no_other_and_is_tried_again(
    tmp_path: Path, machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.failing = {"bp"}
    with pytest.raises(SystemExit, match="1"):
        main(study(tmp_path))
    assert machine.ran == [("bp", 0), ("lr", 0)]
    assert "[2/2] vit_base/cifar10/lr/seed_0: 50.0 %" in capsys.readouterr().out
    assert "| BP (upper bound) | - " in (tmp_path / "table1.md").read_text()
    machine.failing = set()
    main(study(tmp_path))
    assert machine.ran[2:] == [("bp", 0)]
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {
        "summary.json", "command.json", "log.txt", "table1.md", "table1.csv",
    }  # fmt: skip
    main(study(tmp_path, "--seeds", "0", "1"))
    assert machine.ran[3:] == [("bp", 1), ("lr", 1)]


def test_an_entry_is_mean_and_standard_deviation_of_what_is_there(tmp_path: Path, machine: Machine) -> None:
    given = planned(*study(tmp_path, "--seeds", "0", "1", "2", methods=("lr",)))
    assert entry(given) == "-"
    for i, text in ((0, "50.0 (1 of 3 seeds)"), (2, "52.0 ± 2.8 (2 of 3 seeds)"), (1, "52.0 ± 2.0")):
        run_all([given[i]])
        assert entry(given) == text


def test_the_tables_stand_beside_the_papers_figures(
    tmp_path: Path, machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.failing = {"lr"}
    sets, methods = ["--data_sets", "cifar10", "eurosat"], ["--methods", "lr", "ops_lr", "ops_lr_optimal"]
    with pytest.raises(SystemExit):
        main(["--models", "vit_base", *sets, *methods, "--seeds", "0", "1", "--output", str(tmp_path), "--small"])
    text = (tmp_path / "table1.md").read_text()
    assert text.startswith("vit_base in small, test accuracy in percent, mean ± sd over seeds:\n")
    assert entries(text) == [
        ["method", "cifar10", "paper", "eurosat", "paper"],
        ["LR", "-", "87.7", "-", "82.9"],
        ["OPS-LR", "51.0 ± 1.4", "93.2", "51.0 ± 1.4", "89.3"],
        ["OPS-LR, optimal allocator, no pilots (ours)", "51.0 ± 1.4", "-", "51.0 ± 1.4", "-"],
    ]
    assert text in capsys.readouterr().out
    rows = {(row["data_set"], row["method"], row["seed"]): row for row in read_csv(tmp_path / "table1.csv")}
    assert len(rows) == 2 * 3 * 2
    columns = ("test_accuracy", "queries", "steps", "paper")
    assert [rows["eurosat", "ops_lr", "1"][name] for name in columns] == ["0.52", "560", "7", "89.3"]
    assert [rows["eurosat", "lr", "0"][name] for name in columns] == ["", "", "", "82.9"]
    assert rows["eurosat", "ops_lr_optimal", "1"]["paper"] == ""


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of the study that give it images of noise, and weights of a network with another head."""
    root = tmp_path_factory.mktemp("cifar10")
    noise_images(root, train=4, test=1)
    only = [f"cifar10:data.init_args.{name}={given}" for name, given in (("root", root), ("val_images", 10))]
    return ["--small", "--only", *only, "--", weights_argument(root)]


STRATEGIES = {
    "bp": ["Backprop"], "mezo": ["MeZO"], "mezo_nspsa": ["MeZO"], "deepzero_spsa": ["SPSA", "EqualAllocator"],
    "lr": ["LikelihoodRatio", "EqualAllocator"], "ops_spsa": ["SPSA", "GaussianAllocator"],
    "ops_lr": ["LikelihoodRatio", "GaussianAllocator"], "ops_lr_optimal": ["LikelihoodRatio", "OptimalAllocator"],
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_the_command_line_takes_a_cells_arguments_in_small(method: str, tmp_path: Path, cifar10: list[str]) -> None:
    (cell,) = planned(*study(tmp_path, "--seeds", "5", *cifar10, methods=(method,)))
    cli = build(cell.command[3:-2])  # without --ckpt_path
    allocators = [c.allocator for c in cli.trainer.callbacks if isinstance(c, QueryAllocatorCallback)]
    assert [type(each).__name__ for each in (cli.model.strategy, *allocators)] == STRATEGIES[method]
    strategy = STRATEGIES[method][0]
    assert (cli.config["seed_everything"], cli.trainer.max_epochs) == (5, 10)
    assert cli.trainer.default_root_dir == str(cell.folder)
    assert (cli.datamodule.batch_size, cli.datamodule.image_size, len(cli.model.backbone.blocks)) == (32, 32, 6)
    sites = cli.model.strategy.sites
    if strategy == "MeZO":
        assert cli.model.strategy.queries == {"mezo": 2, "mezo_nspsa": 80}[method]
    elif strategy != "Backprop":  # the queries of every site, and where there is noise in activities the paper's widths
        assert [site.queries_per_sample for site in sites] == [20] * 4
        assert [s.sigma for s in sites] == ([1e-5, 1e-4, 1e-3, 1e-3] if strategy == "LikelihoodRatio" else [1e-3] * 4)
        assert cli.model.strategy.pilots.queries == (4 if method == "ops_lr" else 0)
