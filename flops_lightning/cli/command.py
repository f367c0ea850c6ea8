"""The command line: ``fit``, ``plan``, ``validate``, ``test`` and ``predict`` from YAML files, by Lightning's CLI.

The only place that knows arguments. A mistake ends in one short message on stderr and exit code 2; set the environment
variable ``FLOPS_TRACEBACK=1`` to see where it was raised.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
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
from flops_lightning.cli.messages import explain
from flops_lightning.errors import CheckpointError, DamagedImageError, LostQueriesError, SettingError
from flops_lightning.plan.trainer import PlanningTrainer, callbacks_of, refuse_checkpoint
from flops_lightning.resume.last import (
    job_version,
    last_checkpoint,
    started_again,
    with_checkpoint_io,
    with_savers,
    written_to,
)

USAGE_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class UsageError(Exception):
    """The command line or a configuration file was refused; the message is complete."""


_SAME_ON_ALL_RANKS = (UsageError, SettingError, MisconfigurationException)
_MISTAKES = (*_SAME_ON_ALL_RANKS, CheckpointError, DamagedImageError, LostQueriesError)
_PARSER = {"exit_on_error": False, "allow_abbrev": False}  # an abbreviation would hide a misspelt setting


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip: For seamless cloud" not in record.getMessage()


def _cause(error: BaseException) -> BaseException:
    """What was raised first: while it builds objects, the parser wraps an error once per level."""
    while error.__cause__ is not None and not isinstance(error, _MISTAKES):
        error = error.__cause__
    return error


def _with(own: Callback, kind: type[Callback], given: list[Callback]) -> list[Callback]:
    """The callbacks given, and ``own`` where none of them is of its kind."""
    return given if any(isinstance(callback, kind) for callback in given) else [*given, own]


class FlopsCLI(LightningCLI):
    """Lightning's CLI with any LightningModule and any data module, TensorBoard under ``runs/``, and short errors."""

    def __init__(self, **settings: Any) -> None:
        """Parse, build and run; errors call a setting of the model ``model.NAME``, as users write it."""
        try:
            super().__init__(
                LightningModule,
                LightningDataModule,
                trainer_class=PlanningTrainer,
                subclass_mode_model=True,
                subclass_mode_data=True,
                seed_everything_default=0,
                trainer_defaults={"default_root_dir": RUNS},
                auto_configure_optimizers=False,  # the task configures its optimiser; a second way would override it
                **settings,
            )
        except Exception as error:
            cause = _cause(error)
            if isinstance(cause, SettingError):
                model = self._settings["model"].get("init_args") or {}
                if re.split(r"\W", cause.setting)[0] in model:
                    raise SettingError(f"model.{cause.setting}", cause.value, cause.problem, cause.remedy) from error
            raise

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's commands, and ``plan`` after ``fit``; with each the arguments that no user gives."""
        fit, *others = LightningCLI.subcommands().items()
        return dict([fit, ("plan", {"model", "datamodule"}), *others])

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Let the data decide how many classes the model tells apart, and check them before the model is built."""
        parser.link_arguments(
            "data", "model.init_args.num_classes", compute_fn=self._checked_classes, apply_on="instantiate"
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, and explain what was refused."""
        given = cast("list[str]", args)  # main gives nothing else
        try:
            self.config = parser.parse_args(given)
        except argparse.ArgumentError as error:
            command = next((arg for arg in given if arg in self.subcommands()), "")
            hidden = {"self", *self.subcommands().get(command, ())}
            own = (
                [name for name in inspect.signature(getattr(PlanningTrainer, command)).parameters if name not in hidden]
                if command
                else []
            )
            top = {**dict.fromkeys(["config", "seed_everything", "model", "data", *own]), "trainer": Trainer}
            raise UsageError(explain(str(error), Given(given, command, top))) from error

    def before_instantiate_classes(self) -> None:
        """Refuse files and checkpoints that cannot be used, before minutes are spent."""
        methods = [str(file) for file in self._settings.get("config") or () if Path(str(file)).parent.name == "method"]
        if len(methods) > 1:
            problem = "are two methods: settings of the first would stay in the second."
            raise SettingError("config", methods, problem, "Give one of them.")
        path = self._settings.get("ckpt_path")
        if self.subcommand == "plan":
            refuse_checkpoint(path)
        starts_fresh = path is None and not self._settings["model"].get("init_args.checkpoint")
        if starts_fresh and self.subcommand in ("validate", "test", "predict"):
            rank_zero_warn(
                f"{self.subcommand} without --ckpt_path: the head is as it was initialised. --ckpt_path last takes the "
                "newest checkpoint of this configuration's runs."
            )
        if path == "best":
            raise SettingError("ckpt_path", path, "this process has trained nothing to take the best of.", WHERE)
        if path == "last" or (path is None and self.subcommand == "fit" and started_again()):
            path = self._settings["ckpt_path"] = self._last(path)
        if path and path not in ("last", "hpc") and "://" not in path:
            trusted = self._settings.get("weights_only") is False
            check_checkpoint(Path(path), resume=self.subcommand == "fit", trusted=trusted)

    def instantiate_classes(self) -> None:
        """Build data, model and trainer; refuse another number of classes than the data has."""
        try:
            super().instantiate_classes()
        except (ValueError, ImportError) as error:
            cause = _cause(error)
            if isinstance(cause, _MISTAKES):
                raise
            raise UsageError(f"{cause} (FLOPS_TRACEBACK=1 shows where this was raised.)") from error
        given = self._settings["model"].get("init_args.num_classes")
        has = getattr(self.datamodule, "num_classes", given)
        if given is not None and given != has:
            problem, remedy = f"but the data has {has} classes.", "Leave it out: the data decides."
            raise SettingError("model.init_args.num_classes", given, problem, remedy)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer; add what the configuration has none of.

        That is TensorBoard in a folder of its own for every run; for ``fit`` what writes checkpoints; for ``predict`` a
        ``PredictionWriter``; for ``test`` a ``ClassReport``, where the model counts classes.
        """
        settings = self._settings["trainer"]
        given = dict((self.config_init[self.subcommand] if self.subcommand else self.config_init)["trainer"])
        given["callbacks"] = callbacks_of(given)  # a copy: Lightning adds callbacks of its own to the list it is given
        if settings["logger"] in (None, True) and not settings["barebones"]:
            folder = settings["default_root_dir"]
            version = job_version(Path(folder) / self._run_name())
            kwargs["logger"] = TensorBoardLogger(folder, self._run_name(), version, default_hp_metric=False)
        if self.subcommand == "fit" and settings["enable_checkpointing"] is not False and not settings["barebones"]:
            kwargs["plugins"] = with_checkpoint_io(given["plugins"])
            kwargs["callbacks"] = with_savers(given["callbacks"])
        if self.subcommand == "predict":
            kwargs["callbacks"] = _with(PredictionWriter(), BasePredictionWriter, given["callbacks"])
        if self.subcommand == "test" and class_counts(self.model) is not None:
            kwargs["callbacks"] = _with(ClassReport(), ClassReport, given["callbacks"])
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (ValueError, MisconfigurationException) as error:
            cause = _cause(error)
            raise cause if isinstance(cause, SettingError) else UsageError(f"trainer: {cause}") from error
        if self.subcommand == "plan":
            cast("PlanningTrainer", trainer).settings = given
        return trainer

    def _parse_ckpt_path(self) -> None:
        """Take settings from the command line and the files only, and from a checkpoint its state.

        Lightning's method of this name lets the settings saved in a checkpoint override those just given, in silence;
        nothing but overriding it turns that off.
        """

    def _checked_classes(self, data: LightningDataModule) -> Any:
        """Number of classes of a data module that has looked for missing and damaged files, where it can.

        That comes before pretrained weights are fetched and a device is touched; not where the data is still to be
        fetched, or nothing is to be run.
        """
        check = getattr(data, "check", None)
        if self.subcommand and callable(check) and not getattr(data, "download", False):
            check()
        return cast("Any", data).num_classes

    def _last(self, word: str | None) -> str | None:
        """The newest checkpoint of the runs of this name; None where there is none to begin with."""
        settings = self._settings["trainer"]
        own = written_to(settings["callbacks"])
        if settings["logger"] not in (None, True, False) and not own:
            return word  # it alone knows its folder: Lightning looks there
        folder = Path(settings["default_root_dir"])
        runs = None if settings["logger"] is False else folder / self._run_name()
        found = last_checkpoint(runs, own or [folder / "checkpoints"])
        if found is None and self.subcommand != "fit":
            raise SettingError("ckpt_path", word, f"there is no checkpoint under {runs or folder}.", WHERE)
        if found is None:
            rank_zero_info(f"ckpt_path: there is no checkpoint under {runs or folder} yet, the run begins.")
        return None if found is None else str(found)

    @property
    def _settings(self) -> Namespace:
        """What was parsed for the command at hand."""
        return self.config[str(self.subcommand)] if self.subcommand else self.config

    def _run_name(self) -> str:
        """The names of the configuration files, as in ``vit_tiny_digits+equal``, or that of the model's class."""
        files = [Path(str(file)) for file in self._settings.get("config") or []]
        # A run keeps a copy of its settings in runs/NAME/VERSION/config.yaml.
        names = [file.parent.parent.name if file.name == "config.yaml" else file.stem for file in files]
        return "+".join(names) or str(self._settings["model"]["class_path"]).rpartition(".")[2]


def build(args: Sequence[str]) -> FlopsCLI:
    """Seed everything and build model, data and trainer of a configuration without running it.

    Args:
        args: As after ``fit``: ``["--config", "configs/vit_tiny_digits.yaml", ...]``.

    Returns:
        The command line; its attributes ``model``, ``datamodule`` and ``trainer`` are what was built.

    Raises:
        UsageError: The parser or a class refused the arguments.
        SettingError: A setting cannot work.
    """
    return FlopsCLI(run=False, parser_kwargs=_PARSER, args=list(args))


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: Arguments after the program's name; those of the process if None.

    Raises:
        SystemExit: With code 0 after ``--help``, 2 after a mistake in the settings, a damaged image or a checkpoint
            that could not be written, 130 after Ctrl-C, 143 and 138 after SIGTERM and SIGUSR1 (:class:`SaveOnSignal`).
    """
    # Advice for tasks that want the parameters from before their step; here a checkpoint is of the step's end.
    warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
    about = "Train networks with forward passes only. Start: python main.py fit --config configs/vit_tiny_digits.yaml"
    parsers = {"description": about, **_PARSER, **{command: dict(_PARSER) for command in FlopsCLI.subcommands()}}
    given = list(sys.argv[1:] if args is None else args)
    try:
        FlopsCLI(args=given, parser_kwargs=parsers, save_config_kwargs={"overwrite": True})
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except SystemExit as leaving:
        # Lightning shuts a run down on Ctrl-C and then leaves with code 1.
        if isinstance(leaving.__context__, KeyboardInterrupt):
            sys.exit(INTERRUPTED)
        raise
    except Exception as error:
        cause = _cause(error)
        if os.environ.get("FLOPS_TRACEBACK") == "1" or not isinstance(cause, _MISTAKES):
            raise
        if not (isinstance(cause, _SAME_ON_ALL_RANKS) and _first_rank_has_ended()):
            sys.stderr.write(f"\nerror: {cause}\n")
        sys.exit(USAGE_ERROR)


def _first_rank_has_ended(patience: float = 60.0) -> bool:
    """Whether the process that launched this one as a further rank ends soon, which is because of the same mistake.

    It is waited for: Lightning ends the first rank as soon as it finds another one gone, before it has said why.
    """
    parent, deadline = os.getppid(), time.monotonic() + patience
    while int(os.environ.get("LOCAL_RANK", "0")) > 0 and time.monotonic() < deadline:
        if os.getppid() != parent:
            return True
        time.sleep(0.1)
    return False
