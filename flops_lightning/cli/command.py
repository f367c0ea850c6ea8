"""The command line: ``fit``, ``plan``, ``tune``, ``validate``, ``test`` and ``predict``, by Lightning's CLI.

The only place that knows arguments. A mistake ends in one short message on stderr and exit code 2; set the environment
variable ``FLOPS_TRACEBACK=1`` to see where it was raised.
"""

import argparse
import inspect
import logging
import os
import re
import shlex
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, cast

from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from flops_lightning.callbacks.class_report import ClassReport, class_counts
from flops_lightning.callbacks.prediction_writer import PredictionWriter
from flops_lightning.cli.checkpoints import RUNS, WHERE, check_checkpoint
from flops_lightning.cli.given import Given
from flops_lightning.cli.messages import explain, refused_by_lightning
from flops_lightning.errors import CheckpointError, DamagedImageError, LostQueriesError, SettingError, SpentQueriesError
from flops_lightning.plan.trainer import callbacks_of, refuse_checkpoint
from flops_lightning.resume import last
from flops_lightning.settings import constructor_parameters
from flops_lightning.tune.trainer import TuningTrainer, check_tune

USAGE_ERROR = 2


class UsageError(Exception):
    """The command line or a configuration file was refused; the message is complete."""


_SAME_ON_ALL_RANKS = (UsageError, SettingError, MisconfigurationException)
_MISTAKES = (*_SAME_ON_ALL_RANKS, CheckpointError, DamagedImageError, LostQueriesError, SpentQueriesError)
_PARSER = {"exit_on_error": False, "allow_abbrev": False}  # an abbreviation would hide a misspelt setting


def _cause(error: BaseException) -> BaseException:
    """What was raised first: while it builds objects, the parser wraps an error once per level."""
    while error.__cause__ is not None and not isinstance(error, _MISTAKES):
        error = error.__cause__
    return error


def _with(own: Callback, kind: type[Callback], given: list[Callback]) -> list[Callback]:
    return given if any(isinstance(callback, kind) for callback in given) else [*given, own]


class FlopsCLI(LightningCLI):
    """Lightning's CLI with any LightningModule and any data module, TensorBoard under ``runs/``, and short errors."""

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(
                LightningModule, LightningDataModule, trainer_class=TuningTrainer, seed_everything_default=0,
                subclass_mode_model=True, subclass_mode_data=True, trainer_defaults={"default_root_dir": RUNS},
                auto_configure_optimizers=False,  # the task configures its optimiser; a second way would override it
                **settings,
            )  # fmt: skip
        except Exception as error:
            cause = _cause(error)
            own = isinstance(cause, SettingError) and self._settings["model"].get("init_args")
            if isinstance(cause, SettingError) and own and re.split(r"\W", cause.setting)[0] in own:
                # As users write it.
                raise SettingError(f"model.{cause.setting}", cause.value, cause.problem, cause.remedy) from error
            raise

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's commands with the arguments that no user gives, and ``plan`` and ``tune`` after ``fit``."""
        fit, *others = LightningCLI.subcommands().items()
        own = [(name, {"model", "datamodule"}) for name in ("plan", "tune")]
        return dict([fit, *own, *others])

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Let the data decide how many classes the model tells apart and what they are called, and check them first."""
        links = {"num_classes": self._checked_classes, "class_names": self._captions, "template": self._template}
        for name, of_data in links.items():
            parser.link_arguments("data", f"model.init_args.{name}", compute_fn=of_data, apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, and explain what was refused."""
        self._given = given = cast("list[str]", args)
        try:
            self.config = parser.parse_args(given)
        except argparse.ArgumentError as error:
            command = next((arg for arg in given if arg in self.subcommands()), "")
            own = inspect.signature(getattr(TuningTrainer, command)).parameters.keys() if command else set()
            own = own - {"self", *self.subcommands().get(command, ())}
            top = {**dict.fromkeys(["config", "seed_everything", "model", "data", *own]), "trainer": Trainer}
            raise UsageError(explain(str(error), Given(given, command, top))) from error

    def before_instantiate_classes(self) -> None:
        """Refuse files and checkpoints that cannot be used, before minutes are spent."""
        methods = [str(file) for file in self._settings.get("config") or () if Path(str(file)).parent.name == "method"]
        if len(methods) > 1:
            why = "are two methods: settings of the first would stay in the second."
            raise SettingError("config", methods, why, "Give one of them.")
        path = self._settings.get("ckpt_path")
        if self.subcommand == "plan":
            refuse_checkpoint(path)
        if self.subcommand == "tune":
            check_tune(path, self._settings["output"], overwrite=self._settings["overwrite"])
        given = self._model_settings
        # A model that is told the names of its classes has no head, and a language model comes with its own.
        whole = "class_names" in given or "objective" in given
        untrained = path is None and not given.get("checkpoint") and not whole
        if untrained and self.subcommand in ("validate", "test", "predict"):
            rank_zero_warn(
                f"{self.subcommand} without --ckpt_path: the head is as it was initialised. --ckpt_path last takes the "
                "newest checkpoint of this configuration's runs."
            )
        if path == "best":
            raise SettingError("ckpt_path", path, "this process has not trained: there is no best one.", WHERE)
        if path == "last" or (path is None and self.subcommand == "fit" and last.started_again()):
            path = self._settings["ckpt_path"] = self._last(path)
        if path and path not in ("last", "hpc") and "://" not in path:
            trusts = self._settings.get("weights_only") is False
            check_checkpoint(Path(path), resume=self.subcommand == "fit", trusted=trusts)

    def instantiate_classes(self) -> None:
        """Build data, model and trainer; refuse another number of classes than the data has."""
        try:
            super().instantiate_classes()
        except (ValueError, ImportError) as error:
            cause = _cause(error)
            if isinstance(cause, _MISTAKES):
                raise
            raise UsageError(f"{cause} (FLOPS_TRACEBACK=1 shows where this was raised.)") from error
        given, has = self._given_classes, getattr(self.datamodule, "num_classes", None)
        if given is not None and has is not None and given < has:
            problem = f"but the data has {has} classes."
            raise SettingError("model.init_args.num_classes", given, problem, "Leave it out: the data decides.")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer, with a logger, checkpoints, predictions and a class report where none are given."""
        settings = self._settings["trainer"]
        given = dict((self.config_init[self.subcommand] if self.subcommand else self.config_init)["trainer"])
        given["callbacks"] = callbacks_of(given)  # a copy: Lightning adds callbacks of its own to the list it is given
        if settings["logger"] in (None, True) and not settings["barebones"]:
            folder, name = settings["default_root_dir"], self._run_name()
            version = last.job_version(Path(folder) / name)
            kwargs["logger"] = TensorBoardLogger(folder, name, version, default_hp_metric=False)
        if self.subcommand == "fit" and settings["enable_checkpointing"] is not False and not settings["barebones"]:
            kwargs["plugins"] = last.with_checkpoint_io(given["plugins"])
            kwargs["callbacks"] = last.with_savers(given["callbacks"])
        if self.subcommand == "predict":
            kwargs["callbacks"] = _with(PredictionWriter(), BasePredictionWriter, given["callbacks"])
        if self.subcommand == "test" and class_counts(self.model) is not None:
            kwargs["callbacks"] = _with(ClassReport(), ClassReport, given["callbacks"])
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (ValueError, MisconfigurationException) as error:
            cause = _cause(error)
            raise cause if isinstance(cause, SettingError) else UsageError(f"trainer: {cause}") from error
        if self.subcommand in ("plan", "tune"):
            cast("TuningTrainer", trainer).settings = given
            cast("TuningTrainer", trainer).command = shlex.join(["python", "main.py", *self._given])
        return trainer

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning's lets the settings saved in a checkpoint override, in silence, those just given."""

    def _checked_classes(self, data: LightningDataModule) -> Any:
        """Number of classes to build the model for, after a look for missing and damaged files where there are any."""
        check = getattr(data, "check", None)
        if self.subcommand and callable(check) and not getattr(data, "download", False):
            check()
        given, has = self._given_classes, getattr(data, "num_classes", None)
        arguments = self._model_settings
        if given is None and has is None and "num_classes" in arguments:
            if arguments["num_classes"] is not None:
                return arguments["num_classes"]  # the default of the model's class
            remedy = "Write it, or give the data module a num_classes."
            raise SettingError("num_classes", None, f"{type(data).__name__} does not say how many.", remedy)
        return has if given is None else given

    @property
    def _model_settings(self) -> Any:
        """What the model is built with, as given."""
        return self._settings["model"].get("init_args") or {}

    def _captions(self, data: LightningDataModule) -> Any:
        """Names of the classes: those that are given, or else the data's, if the model wants any."""
        given = self._model_settings
        if given.get("class_names") is not None or "class_names" not in given:
            return given.get("class_names")
        self._checked_classes(data)
        return getattr(data, "display_names", None)

    def _template(self, data: LightningDataModule) -> Any:
        """The caption around a name, likewise; all of the data's where the model averages several."""
        given = self._model_settings
        return given.get("template") or getattr(data, "templates" if given.get("ensemble") else "template", None)

    def _last(self, word: str | None) -> str | None:
        """The newest checkpoint of the runs of this name; None where there is none yet."""
        settings = self._settings["trainer"]
        own, folder = last.written_to(settings["callbacks"]), Path(settings["default_root_dir"])
        runs = None if settings["logger"] in (False, []) else folder / self._run_name()
        if settings["logger"] not in (None, True, False, []):
            runs = last.runs_of_logger(settings["logger"])
            if runs is None and not own:
                raise SettingError(
                    "ckpt_path", "last", "the logger alone knows where its runs lie.", "Give the path of a checkpoint."
                )
        own = own or [folder / "checkpoints", *(folder / "checkpoints").glob("*/**")]
        found = last.last_checkpoint(runs, own)
        if found is not None:
            return str(found)
        if unfit := last.unfit_checkpoint(runs, own):
            problem = f"{unfit} is not a complete checkpoint in a folder `checkpoints`, and there is no other."
            raise SettingError("ckpt_path", "last", problem, "Give the path of one, or move it away to start over.")
        if self.subcommand != "fit":
            raise SettingError("ckpt_path", word, f"there is no checkpoint under {runs or folder}.", WHERE)
        rank_zero_info(f"ckpt_path: there is no checkpoint under {runs or folder} yet, the run begins.")
        return None

    @property
    def _given_classes(self) -> int | None:
        """The user's ``num_classes``, which wins over that of the data; the default of the model's class does not."""
        model = self._settings["model"]
        given = cast("int | None", model.get("init_args.num_classes"))
        known = constructor_parameters(resolve_name(model["class_path"])).get("num_classes")
        return None if known is not None and given == known.default else given

    @property
    def _settings(self) -> Namespace:
        return self.config[str(self.subcommand)] if self.subcommand else self.config

    def _run_name(self) -> str:
        """The names of the configuration files, as in ``vit_tiny_digits+equal``, or that of the model's class."""
        files = [Path(str(file)) for file in self._settings.get("config") or []]
        # A run keeps a copy of its settings in runs/NAME/VERSION/config.yaml.
        names = [file.parent.parent.name if file.name == "config.yaml" else file.stem for file in files]
        return "+".join(names) or str(self._settings["model"]["class_path"]).rpartition(".")[2]


def build(args: Sequence[str]) -> FlopsCLI:
    """Seed everything and build a configuration without running it: attributes ``model``, ``datamodule``, ``trainer``.

    ``args`` are as after ``fit``. Raises :class:`UsageError` or :class:`SettingError` where they are refused.
    """
    return FlopsCLI(run=False, parser_kwargs=_PARSER, args=list(args))


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line with ``args``, or else with those of the process.

    Exits with code 0 after ``--help``, 2 after a mistake in the settings, a damaged image or a checkpoint that could
    not be written, 130 after Ctrl-C, 143 and 138 after SIGTERM and SIGUSR1 (:class:`SaveOnSignal`).
    """
    # Advice for tasks that want the parameters from before their step; here a checkpoint is of the step's end.
    warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")
    told = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    told.addFilter(lambda record: "Tip: For seamless cloud" not in record.getMessage())
    about = "Train networks with forward passes only. Start: python main.py fit --config configs/quickstart.yaml"
    parsers = {"description": about, **_PARSER, **{command: dict(_PARSER) for command in FlopsCLI.subcommands()}}
    given = list(sys.argv[1:] if args is None else args)
    try:
        FlopsCLI(args=given, parser_kwargs=parsers, save_config_kwargs={"overwrite": True})
    except (KeyboardInterrupt, SystemExit) as leaving:
        # Lightning shuts a run down on Ctrl-C and then leaves with code 1.
        if isinstance(leaving, KeyboardInterrupt) or isinstance(leaving.__context__, KeyboardInterrupt):
            sys.exit(130)  # 128 + SIGINT, as shells report it
        raise
    except Exception as error:
        cause = _cause(error)
        refused = refused_by_lightning(cause)
        if os.environ.get("FLOPS_TRACEBACK") == "1" or not (isinstance(cause, _MISTAKES) or refused):
            raise
        if not ((refused or isinstance(cause, _SAME_ON_ALL_RANKS)) and _first_rank_has_ended()):
            sys.stderr.write(f"\nerror: {'trainer: ' + ' '.join(str(cause).split()) if refused else cause}\n")
        sys.exit(USAGE_ERROR)


def _first_rank_has_ended(patience: float = 60.0) -> bool:
    """Whether the process that launched this rank ends soon, of the same mistake; ending first would silence it."""
    parent, deadline = os.getppid(), time.monotonic() + patience
    while int(os.environ.get("LOCAL_RANK", "0")) > 0 and time.monotonic() < deadline:
        if os.getppid() != parent:
            return True
        time.sleep(0.1)
    return False
