import copy
import csv
import pickle
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import save_file

from flops_lightning.callbacks import ClassReport
from flops_lightning.cli.command import FlopsCLI, main
from flops_lightning.cli.messages import Given, explain
from flops_lightning.datamodules import DigitsDataModule
from flops_lightning.errors import SettingError
from tests.digits import TINY

REPOSITORY = Path(__file__).parents[2]
SITE = "model.init_args.strategy.init_args.sites"

SETTINGS = {
    "trainer": {"max_epochs": 1, "accelerator": "cpu"},
    "model": {
        "class_path": "flops_lightning.tasks.ForwardImageClassifier",
        "init_args": {
            "model_name": "vit_tiny_patch16_224",
            "optimizer": {"lr": 0.001},
            "strategy": {
                "class_path": "flops_lightning.strategies.LikelihoodRatio",
                "init_args": {"sites": [{"stages": ["embed", "blocks.0"]}, {"stages": ["head"], "sigma": 0.1}]},
            },
        },
    },
    "data": {"class_path": "flops_lightning.datamodules.DigitsDataModule", "init_args": {"rotation": 40}},
}


FAULTS = {
    "interrupt": KeyboardInterrupt(),
    "misconfigured": MisconfigurationException("this does not go with that. Leave this out."),
    "bug": RuntimeError("a bug"),
}


class Toy(LightningModule):
    """A linear classifier of digits that can be told to fail."""

    seen: dict[str, object] = {}  # noqa: RUF012  what the test wants to know about the module that the CLI built

    def __init__(self, num_classes: int, lr: float = 0.1, fault: str = "") -> None:
        super().__init__()
        self.save_hyperparameters()
        if fault == "setting":
            raise SettingError("fault[0].name", fault, "does not exist.", "Leave it out.")
        self.layer = torch.nn.Linear(64, num_classes)

    def training_step(self, batch):
        Toy.seen = {"num_classes": self.layer.out_features, "lr": self.hparams["lr"]}
        if self.hparams["fault"]:
            raise FAULTS[self.hparams["fault"]]
        return torch.nn.functional.cross_entropy(self.layer(batch[0].flatten(1)), batch[1])

    def test_step(self, batch):
        Toy.seen = {"weight": self.layer.weight.detach().clone(), "lr": self.hparams["lr"]}

    def predict_step(self, batch):
        probability = self.layer(batch[0].flatten(1)).softmax(1)
        return {"label": probability.argmax(1), "probability": probability}

    def on_load_checkpoint(self, checkpoint):
        if self.hparams["fault"] == "foreign":
            raise SettingError("ckpt_path", "x.ckpt", "is of another configuration.", "Give its own.")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"])


class Unlabelled(LightningDataModule):
    """The digits, without a word about their classes."""

    def train_dataloader(self):
        data = DigitsDataModule()
        data.setup("fit")
        return data.train_dataloader()


class Guessing(Toy):
    """Has a number of classes of its own choice."""

    def __init__(self, num_classes: int = 20, lr: float = 0.1, fault: str = "") -> None:
        super().__init__(num_classes, lr, fault)


class Ten(Toy):
    """Takes no number of classes."""

    def __init__(self, lr: float = 0.1, fault: str = "") -> None:
        super().__init__(10, lr, fault)


class Silent(BasePredictionWriter):
    def write_on_batch_end(self, *_):
        pass


class Code:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("ran"),)


TOY = {
    "trainer": {
        "max_steps": 2, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False,
        "limit_val_batches": 0, "limit_test_batches": 1,
    },
    "model": {"class_path": f"{__name__}.Toy", "init_args": {}},
    "data": {"class_path": "flops_lightning.datamodules.DigitsDataModule", "init_args": {}},
}  # fmt: skip


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def written(settings: dict, name: str = "given.yaml") -> str:
    Path(name).write_text(yaml.safe_dump(settings, sort_keys=False))
    return name


def changed(key: str, value: object, settings: dict = SETTINGS) -> str:
    """The path of a file with one setting changed, or taken out where the value is ``...``."""
    settings = copy.deepcopy(settings)
    *way, last = [int(name) if name.isdigit() else name for name in re.split(r"[.\[\]]+", key)]
    inner = settings
    for name in way:
        inner = inner[name]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return written(settings)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "no command was given. Write one of fit, plan, validate, test, predict first"),
        (["fitt"], "fitt is not a command. Did you mean `fit`?"),
        (["frobnicate"], "frobnicate is not a command. Choose one of: fit, plan, predict, test, tune, validate."),
        (["--trainer.max_epochs", "3", "fit"], "--trainer.max_epochs stands before the command. Write `fit` first."),
        (["fit"], "data and model not given. Add --config FILE, a YAML file with `data:` and `model:`."),
        (["fit", "given.yaml"], "given.yaml is not expected here."),
        (["fit", "--confg", "given.yaml"], "--confg is not a setting. Did you mean `config`?"),
        (["fit", "--config"], "--config has no value. Write it after a space: --config VALUE"),
        (["fit", "--config", "gone.yaml"], "--config gone.yaml: there is no such file under"),
        (["fit", "--config=givn.yaml"], "Did you mean `given.yaml`?"),
        (["fit", "--trainer.max_epoch", "3"], "--trainer.max_epoch is not a setting. Did you mean `max_epochs`?"),
        (["fit", "--trainer.max_epochs", "x"], "trainer.max_epochs = x: write a whole number or null."),
        (["fit", "-c", "given.yaml", "--data.rotatio", "3"], "data.rotatio is not a setting. Did you mean `rotation`?"),
        (["fit", "-c", "given.yaml", "--data.rotation", "x"], "data.rotation = x: write a number."),
        (["fit", "-c", "given.yaml", "--data", "nowhere.Data"], "data = nowhere.Data: No module named 'nowhere'. Corr"),
        (["fit", "-c", "given.yaml", "--model.optimizer.lrr", "1"], "model.optimizer.lrr is not a setting. Did you"),
        (["fit", "-c", "given.yaml", "--model.strategy.tempo", "1"], "model.strategy.tempo is not a setting. Choose"),
        (["fit", "-c", "given.yaml", "--ckpt_path", "gone.ckpt"], "ckpt_path = 'gone.ckpt': is not a file."),
        (["test", "-c", "given.yaml", "--ckpt_path", "best"], "ckpt_path = 'best': this process has not trained"),
        (["fit", "-c", "given.yaml", "--model.init_args.strat.x=3"], "--model.init_args.strat.x is not a setting."),
    ],
)
def test_a_mistake_on_the_command_line_is_named_with_its_remedy(args, message, refused):
    written(SETTINGS)
    assert message in refused(*args)


@pytest.mark.parametrize(
    ("flag", "value", "list_name"),
    [
        (f"--{SITE}.0.sigma", " 0.1", "sites"),
        (f"--{SITE}[0].sigma", "=0.1", "sites"),
        ("--model.strategy.sites.1.stages.0", "=embed", "sites"),
        ("--model.strategy.sites.0", " 3", "sites"),
        ("--trainer.callbacks.0.init_args.logging_interval", " step", "callbacks"),
    ],
)
def test_an_entry_of_a_list_is_named_in_full_with_the_way_to_change_it(flag, value, list_name, refused):
    message = refused("fit", "-c", written(SETTINGS), *f"{flag}{value}".split())
    assert message.startswith(f"{flag} is an entry of a list, and lists are replaced whole. Copy the list `{list_name}")
    assert message.endswith("into a file overlay.yaml, change it there, and add --config overlay.yaml.")


def test_an_overlay_replaces_a_list_whole(monkeypatch):
    built = []
    monkeypatch.setattr(Trainer, "fit", lambda self, model, **_: built.append(model.strategy.sites))
    file = changed("model.init_args.model_kwargs", {**TINY, "depth": 1})
    sites = [{"stages": ["embed"], "sigma": 0.25}, {"stages": ["blocks.0"]}, {"stages": ["pool", "head"]}]
    overlay = written({"model": {"init_args": {"strategy": {"init_args": {"sites": sites}}}}}, "overlay.yaml")
    main(["fit", "-c", file, "-c", overlay])
    assert [site.name for site in built[0]] == ["embed", "blocks.0", "pool..head"]
    assert built[0][0].sigma == 0.25


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("trainer:\n  max_epochs: 1\n bad: [1,\n", "line 3, column 2: "),
        ("trainer:\n\tmax_epochs: 1\n", "line 2, column 1: found character '\\t'"),
        ("model: [1, 2\n", "Check the indentation (spaces, no tabs), brackets and quotes there."),
        ("- a\n- b\n", "holds no settings. Write them as `name: value` under trainer, model and data."),
        ("", "holds no settings."),
    ],
)
def test_a_file_that_is_not_settings_is_named_with_the_place(content, message, refused):
    Path("given.yaml").write_text(content)
    answer = refused("fit", "--config", "given.yaml")
    assert answer.startswith("--config given.yaml: ")
    assert message in answer


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("trainer.max_epoch", 3, " is not a setting. Did you mean `max_epochs`?"),
        ("trainer.max_epochs", "x", " = x: write a whole number or null."),
        ("trainer.precision", "bf17-mixed", "Did you mean `bf16-mixed`?"),
        ("trainr", {"max_epochs": 1}, " is not a setting. Did you mean `trainer`?"),
        ("model.init_arg", {}, " is not a setting. Did you mean `init_args`?"),
        ("model.class_path", "flops_lightning.tasks.ImageClassifier", "tasks.ForwardImageClassifier`?"),
        ("model.class_path", "flops_lightning.old.SPSA", ": it has moved. Write flops_lightning.strategies.SPSA."),
        ("model.class_path", "flop.tasks.Classifier", "No module named 'flop'. Correct the module or its name"),
        ("model.class_path", "flops_lightning.errors.SettingError", " is not a LightningModule."),
        ("model.init_args.model_nam", "x", " is not a setting. Did you mean `model_name`?"),
        ("model.init_args.label_smoothing", "x", " = x: write a number."),
        ("model.init_args.optimizer.lrr", 1.0, " is not a setting. Did you mean `lr`?"),
        ("model.init_args.optimizer.lr", "x", " = x: write a number"),
        ("model.init_args.strategy.class_path", "LikelihoodRati", "Did you mean `flops_lightning.LikelihoodRatio`?"),
        ("model.init_args.strategy.init_args.variantt", "plain", " is not a setting. Did you mean `variant`?"),
        ("model.init_args.strategy.init_args.variant", "plainn", "Did you mean `plain`?"),
        (SITE, "head", " = head: write a list"),
        (f"{SITE}[1].sigm", 0.1, " is not a setting. Did you mean `sigma`?"),
        (f"{SITE}[1].sigma", "x", " = x: write a number."),
        (f"{SITE}[1].kind", "blok", "Did you mean `block`?"),
        ("data.init_args.rotatio", 3, " is not a setting. Did you mean `rotation`?"),
        ("data.init_args.batch_size", 1.5, " = 1.5: write a whole number."),
        ("seed_everything", "x", " = x: write true or false or a whole number."),
    ],
)
def test_a_wrong_name_or_value_in_a_file_is_named_with_its_line_and_remedy(key, value, remedy, refused):
    message = refused("fit", "--config", changed(key, value))
    assert message.startswith(f"{key} (given.yaml, line {place(key)})")
    assert remedy in message


def place(key: str) -> int:
    """The line at which ``key`` stands in the file, found without the code under test."""
    lines = Path("given.yaml").read_text().splitlines()
    at = 0
    for name in re.split(r"\.|(?=\[)", key):
        if name.startswith("["):
            items = [i for i, line in enumerate(lines) if i >= at and re.match(r"\s*- stages:", line)]
            at = items[int(name[1:-1])]
        else:
            at = next(i for i, line in enumerate(lines) if i >= at and re.match(rf"[\s-]*{name}:", line))
    return at + 1


def test_a_class_that_cannot_be_imported_is_named_with_its_place_or_the_modules_own_words(refused, monkeypatch):
    monkeypatch.syspath_prepend(Path.cwd())
    Path("broken_module.py").write_text("def f(:\n")
    assert "(broken_module.py, line 1)" in refused("fit", "-c", changed("model.class_path", "broken_module.Task"))
    callbacks = [{"class_path": "LearningRateMonitor"}, {"class_path": "flops_lightning.callbacks.RunSumary"}]
    message = refused("fit", "-c", changed("trainer.callbacks", callbacks))
    line = next(i for i, text in enumerate(Path("given.yaml").read_text().splitlines(), 1) if "RunSumary" in text)
    assert message.startswith(f"trainer.callbacks[1].class_path (given.yaml, line {line}) = ")
    assert message.endswith("Did you mean `flops_lightning.callbacks.RunSummary`?")


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("model.init_args.model_name", "is not given. Add `model_name:` below model.init_args (given.yaml, line "),
        ("model.class_path", "is not given. Add it above `init_args:` (given.yaml, line "),
    ],
)
def test_a_missing_setting_is_named_with_the_place_where_it_belongs(key, remedy, refused):
    message = refused("fit", "--config", changed(key, ...))
    assert message.startswith(f"{key} {remedy}")


def test_the_last_file_that_sets_a_value_is_the_one_named(refused):
    first = written(TOY, "first.yaml")
    second = written({"trainer": {"max_epochs": "x"}}, "second.yaml")
    assert refused("fit", "-c", first, "-c", second).startswith("trainer.max_epochs (second.yaml, line 2) = x")


@pytest.mark.parametrize("overlay", [{"lr": 0.5}, {"lrr": 0.5}])
def test_an_overlay_needs_no_class_and_is_not_told_to_name_one(overlay, refused):
    base = changed("model.init_args", {"lrr": 0.1}, TOY) if "lr" in overlay else written(TOY)
    message = refused("fit", "-c", base, "-c", written({"model": {"init_args": overlay}}, "overlay.yaml"))
    place = "given.yaml, line 11" if "lr" in overlay else "overlay.yaml, line 3"
    assert message == f"model.init_args.lrr ({place}) is not a setting. Did you mean `lr`?"


def test_a_report_in_unknown_words_is_passed_on():
    assert explain("something never heard of", Given([], "fit", {})) == "something never heard of"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data.init_args.batch_size", -1, "data.batch_size = -1: "),
        ("model.init_args.num_classes", 7, "model.init_args.num_classes = 7: but the data has 10 classes. Leave it"),
        ("model.init_args.fault", "setting", "model.fault[0].name = 'setting': does not exist. Leave it out."),
        ("trainer.strategy", "x", "trainer: You selected an invalid strategy name: `strategy='x'`"),
    ],
)
def test_a_refusal_while_building_is_printed_alone_with_the_setting_as_users_write_it(key, value, message, refused):
    assert refused("fit", "-c", changed(key, value, TOY)).startswith(message)


@pytest.mark.parametrize(
    ("model", "data", "given", "classes"),
    [
        ("Toy", "DigitsDataModule", None, 10),
        ("Toy", "DigitsDataModule", 12, 12),  # a head with classes to spare
        ("Toy", "Unlabelled", 12, 12),
        ("Toy", "Unlabelled", None, "model.num_classes = None: Unlabelled does not say how many. Write it, or give"),
        ("Guessing", "DigitsDataModule", None, 10),
        ("Guessing", "Unlabelled", None, 20),
        ("Guessing", "Unlabelled", 12, 12),
        ("Ten", "DigitsDataModule", None, 10),
        ("Ten", "Unlabelled", None, 10),
    ],
)
def test_the_number_of_classes_is_the_users_or_that_of_the_data_or_of_the_model(model, data, given, classes, refused):
    settings = copy.deepcopy(TOY)
    settings["model"]["class_path"] = f"{__name__}.{model}"
    settings["data"]["class_path"] = f"{DigitsDataModule.__module__ if data[0] == 'D' else __name__}.{data}"
    arguments = ["fit", "-c", written(settings), *(["--model.num_classes", str(given)] if given else [])]
    if isinstance(classes, str):
        assert refused(*arguments).startswith(classes)
    else:
        main(arguments)
        assert Toy.seen["num_classes"] == classes


def test_a_refusal_while_running_is_printed_alone(refused):
    answer = refused("fit", "-c", written(TOY), "--model.fault", "misconfigured")
    assert answer == "this does not go with that. Leave this out."


def test_what_lightning_refuses_late_is_one_line_too(refused):
    stopping = {"class_path": "EarlyStopping", "init_args": {"monitor": "nowhere", "check_on_train_epoch_end": True}}
    settings = copy.deepcopy(TOY)
    settings["trainer"] |= {"callbacks": [stopping], "max_steps": -1, "max_epochs": 1, "limit_train_batches": 2}
    message = refused("fit", "-c", written(settings))
    assert message.startswith("trainer: Early stopping conditioned on metric `nowhere` which is not available.")


@pytest.mark.parametrize("fault", ["misconfigured", "bug"])
def test_a_traceback_is_shown_where_it_is_asked_for_and_of_a_bug(fault, monkeypatch):
    monkeypatch.setenv("FLOPS_TRACEBACK", "1" if fault == "misconfigured" else "0")
    with pytest.raises(type(FAULTS[fault])):
        main(["fit", "-c", written(TOY), "--model.fault", fault])


@pytest.mark.parametrize("parents", [[7, 7, 1], [7] * 100])
def test_a_further_rank_repeats_a_message_only_if_the_first_rank_stays(parents, monkeypatch, capsys):
    remaining = iter(parents)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("os.getppid", lambda: next(remaining))
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr("time.monotonic", iter(range(500)).__next__)
    with pytest.raises(SystemExit):
        main(["fit", "-c", written(TOY), "--trainer.max_epoch", "3"])
    assert capsys.readouterr().err.count("error: ") == (0 if parents[-1] == 1 else 1)


@pytest.mark.slow
def test_a_batch_that_two_processes_cannot_share_is_told_once():
    command = [sys.executable, "main.py", "fit", "-c", "configs/vit_tiny_digits.yaml", "--model.checkpoint="]
    given = ["--data.batch_size=63", "--trainer.devices=2", "--trainer.strategy=ddp"]
    answer = subprocess.run([*command, *given], capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert answer.returncode == 2
    assert re.findall("error: .*", answer.stderr) == [
        "error: data.batch_size = 63: cannot be divided evenly between 2 processes. Use 62 or 64."
    ]


def test_interrupting_ends_with_130(capsys):
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as leaving:
            main(["fit", "-c", written(TOY), "--model.fault", "interrupt"])
    finally:
        signal.signal(signal.SIGINT, handler)
    assert leaving.value.code == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_run_has_a_folder_of_its_own_from_which_it_can_be_repeated():
    main(["fit", "-c", written(TOY, "toy.yaml"), "--model.lr", "0.25"])
    assert Toy.seen == {"num_classes": 10, "lr": 0.25}
    first = Path("runs/toy/version_0")
    kept = yaml.safe_load((first / "config.yaml").read_text())
    assert kept["model"]["init_args"]["lr"] == 0.25
    assert len(list(first.glob("events.out.tfevents.*"))) == 1

    main(["fit", "-c", str(first / "config.yaml")])
    assert Toy.seen["lr"] == 0.25
    main(["fit", "-c", "toy.yaml", "-c", written({"seed_everything": 1}, "seed1.yaml"), "--trainer.logger", "true"])
    names = {str(path.relative_to("runs")) for path in Path("runs").glob("*/*")}
    assert names == {"toy+seed1/version_0", "toy/version_0", "toy/version_1"}


def test_the_folder_and_the_logger_can_be_chosen():
    main(["fit", "-c", written(TOY, "toy.yaml"), "--trainer.default_root_dir", "elsewhere"])
    assert Path("elsewhere/toy/version_0/config.yaml").is_file()
    csv = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "tables"}}
    main(["fit", "-c", changed("trainer.logger", csv, TOY)])
    assert Path("tables/lightning_logs/version_0/config.yaml").is_file()
    assert not Path("runs").exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The checkpoint of a short run."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(["fit", "-c", written(TOY, "toy.yaml"), "--model.lr", "0.25"])
    return next((folder / "runs/toy/version_0/checkpoints").glob("*.ckpt"))


def test_settings_given_beside_a_checkpoint_win_over_those_saved_in_it(trained):
    assert Toy.load_from_checkpoint(trained, weights_only=True).hparams["lr"] == 0.25
    weight = torch.load(trained, weights_only=True)["state_dict"]["layer.weight"]
    main(["test", "-c", written(TOY), "--ckpt_path", str(trained), "--model.lr", "0.5"])
    assert torch.equal(Toy.seen["weight"], weight)
    assert Toy.seen["lr"] == 0.5


def write_bytes(file: str, content: bytes) -> None:
    Path(file).write_bytes(content)


def save(file: str, content: object) -> None:
    torch.save(content, file)


def save_damaged(file: str, content: object) -> None:
    save(file, content)
    write_bytes(file, Path(file).read_bytes()[:-400])


RUN_STATE = {"state_dict": {}, "pytorch-lightning_version": "2.5.0", "optimizer_states": []}
UNREADABLE = "cannot be read ("
RUN = "but a checkpoint of a run has 'state_dict' and 'pytorch-lightning_version'. Give one from runs/NAME/"


@pytest.mark.parametrize(
    ("name", "write", "content", "message"),
    [
        ("x.ckpt", write_bytes, b"", UNREADABLE),
        ("x.ckpt", write_bytes, b"no checkpoint", UNREADABLE),
        ("x.ckpt", write_bytes, pickle.dumps(Code()), UNREADABLE),
        ("x.ckpt", save, RUN_STATE | {"more": Code()}, UNREADABLE),
        ("x.ckpt", save_damaged, RUN_STATE | {"more": torch.ones(500)}, UNREADABLE),
        ("x.ckpt", save, {"weight": torch.ones(3)}, f"holds a dictionary with 'weight', {RUN}"),
        ("x.ckpt", save, {"state_dict": {"weight": torch.ones(3)}}, f"holds a dictionary with 'state_dict', {RUN}"),
        ("x.ckpt", save, torch.ones(3), f"holds a Tensor, {RUN}"),
        (
            "x.safetensors",
            lambda file, content: save_file(content, file),
            {"weight": torch.ones(3)},
            "holds weights a",
        ),
        ("x.ckpt", lambda file, _: Path(file).mkdir(), None, "is not a file."),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused_before_anything_is_built(
    name, write, content, message, refused, monkeypatch
):
    monkeypatch.setattr(Toy, "__init__", lambda *_, **__: pytest.fail("the model was built"))
    write(name, content)
    for command in ("fit", "test"):
        answer = refused(command, "-c", written(TOY), "--ckpt_path", name)
        assert answer.startswith(f"ckpt_path = {name!r}: ")
        assert message in answer
    assert not Path("ran").exists()


def test_training_goes_on_only_from_a_checkpoint_that_holds_the_optimiser(trained, refused):
    state = torch.load(trained, weights_only=True)
    del state["optimizer_states"]
    torch.save(state, "weights.ckpt")
    message = refused("fit", "-c", written(TOY), "--ckpt_path", "weights.ckpt")
    assert message.startswith("ckpt_path = 'weights.ckpt': holds the weights of a run without the optimiser's state")
    main(["test", "-c", written(TOY), "--ckpt_path", "weights.ckpt"])
    assert torch.equal(Toy.seen["weight"], state["state_dict"]["layer.weight"])


def test_pickled_objects_are_read_where_the_user_trusts_them(trained):
    state = torch.load(trained, weights_only=True)
    torch.save(state | {"more": Code()}, "trusted.ckpt")
    main(["test", "-c", written(TOY), "--ckpt_path", "trusted.ckpt", "--weights_only", "false"])
    assert torch.equal(Toy.seen["weight"], state["state_dict"]["layer.weight"])


@pytest.mark.parametrize("command", ["fit", "test"])
def test_a_checkpoint_that_the_task_refuses_is_reported_in_its_words(command, trained, refused):
    answer = refused(command, "-c", written(TOY), "--model.fault", "foreign", "--ckpt_path", str(trained))
    assert answer == "ckpt_path = 'x.ckpt': is of another configuration. Give its own."


def test_predict_writes_a_table(trained):
    main(["predict", "-c", written(TOY, "toy.yaml"), "--ckpt_path", str(trained)])
    with Path("runs/toy/version_0/predictions.csv").open() as file:
        rows = list(csv.DictReader(file))

    data = DigitsDataModule()
    data.setup("predict")
    images = torch.cat([batch[0] for batch in data.predict_dataloader()])
    model = Toy.load_from_checkpoint(trained, weights_only=True)
    labels = model.predict_step([images])["label"]
    assert [int(row["index"]) for row in rows] == list(range(360))
    assert [int(row["label"]) for row in rows] == labels.tolist()


@pytest.fixture
def callbacks(monkeypatch):
    """Those of the trainer that the command line makes."""
    noted, make = [], FlopsCLI.instantiate_trainer

    def noting(self, **settings):
        trainer = make(self, **settings)
        noted.extend(trainer.callbacks)
        return trainer

    monkeypatch.setattr(FlopsCLI, "instantiate_trainer", noting)
    return noted


@pytest.mark.parametrize(("writer", "tables"), [("Silent", 0), ("PredictionWriter", 1)])
@pytest.mark.parametrize("as_list", [True, False])
def test_predict_adds_no_second_writer(writer, tables, as_list, callbacks):
    module = __name__ if writer == "Silent" else "flops_lightning.callbacks"
    callback = {"class_path": f"{module}.{writer}"}
    main(["predict", "-c", changed("trainer.callbacks", [callback] if as_list else callback, TOY)])
    assert [type(each).__name__ for each in callbacks if isinstance(each, BasePredictionWriter)] == [writer]
    assert len(list(Path("runs").rglob("predictions.csv"))) == tables


@pytest.mark.parametrize("given", [[], [{"class_path": "flops_lightning.callbacks.ClassReport"}]])
def test_test_writes_one_table_of_the_classes(given, callbacks):
    settings = copy.deepcopy(SETTINGS)
    settings["trainer"] |= {"callbacks": given, "enable_progress_bar": False}
    settings["model"]["init_args"] |= {"model_kwargs": {**TINY, "depth": 1}, "strategy": None}
    main(["test", "-c", written(settings)])
    assert sum(isinstance(each, ClassReport) for each in callbacks) == 1
    with Path("runs/given/version_0/class_accuracy.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == list(DigitsDataModule.class_names)
    assert sum(int(row["images"]) for row in rows) == 360


def test_a_model_that_counts_no_classes_is_tested_without_a_table(callbacks):
    main(["test", "-c", written(TOY)])
    assert callbacks
    assert not any(isinstance(each, (BasePredictionWriter, ClassReport)) for each in callbacks)
    assert not list(Path("runs").rglob("*.csv"))


def test_the_seed_is_0_unless_given(monkeypatch):
    starts = []
    monkeypatch.setattr(Trainer, "fit", lambda self, model, **_: starts.append(model.layer.weight.detach().clone()))
    file = written(TOY)
    for extra in ([], ["--seed_everything", "0"], ["--seed_everything", "1"]):
        main(["fit", "-c", file, *extra])
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


@pytest.mark.slow
def test_help_appears_fast():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "main.py", "--help"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Time of the processor, 4 s: time on the wall would tell how busy the machine is.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 15
    for command in ("fit", "plan", "tune", "validate", "test", "predict"):
        assert re.search(rf"^\s+{command}\s", answer.stdout, re.MULTILINE)


def test_two_methods_at_once_are_refused(monkeypatch, refused):
    monkeypatch.chdir(REPOSITORY)
    files = ["configs/vit_tiny_digits.yaml", "configs/method/mezo.yaml", "configs/method/lr.yaml"]
    message = refused("fit", *(part for file in files for part in ("--config", file)))
    assert "are two methods: settings of the first would stay in the second. Give one of them." in message
