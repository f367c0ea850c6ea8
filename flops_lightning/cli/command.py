"""The command line: ``fit``, ``plan``, ``validate``, ``test`` and ``predict`` from YAML files, by Lightning's CLI.

The only place that knows arguments. A mistake ends in one short message on stderr and exit code 2; set the environment
variable ``FLOPS_TRACEBACK=1`` to see where it was raised.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import os
import sys
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from flops_lightning.callbacks.class_report import ClassReport, class_counts
from flops_lightning.callbacks.prediction_writer import PredictionWriter
from flops_lightning.cli.errors import Context, explain
from flops_lightning.errors import CheckpointError, DamagedImageError, LostQueriesError, SettingError
from flops_lightning.plan.trainer import PlanningTrainer, refuse_checkpoint
from flops_lightning.resume.last import (
    job_version,
    last_checkpoint,
    started_again,
    with_checkpoint_io,
    with_savers,
    written_to,
)

RUNS = "runs"
USAGE_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it

_WHERE = f"Give the path of a checkpoint; they lie under {RUNS}/NAME/VERSION/checkpoints."
_PLAIN = "Give a checkpoint of a run, or give plain weights as model.init_args.checkpoint."
_SHARDED = ("meta.pt", "checkpoint")  # what marks a folder as a checkpoint, of FSDP and of DeepSpeed


class UsageError(Exception):
    """The command line or a configuration file was refused; the message is complete."""


_MISTAKES = (
    UsageError, SettingError, CheckpointError, DamagedImageError, LostQueriesError, MisconfigurationException,
)  # fmt: skip


def _cause(error: BaseException) -> BaseException:
    """What was raised first: while it builds objects, the parser wraps an error once per level."""
    while error.__cause__ is not None and not isinstance(error, _MISTAKES):
        error = error.__cause__
    return error


def _check_checkpoint(file: Path, *, resume: bool, trusted: bool) -> None:
    """Refuse a file that is not a checkpoint of Lightning.

    Args:
        file: What was given as ``ckpt_path``.
        resume: Whether training goes on from there, which takes more than weights.
        trusted: Whether the user allows code inside the file to run, with ``weights_only: false``.
    """
    if any((file / name).exists() for name in _SHARDED):
        return  # a folder written by several processes, which Lightning checks itself
    if not file.is_file():
        raise SettingError("ckpt_path", str(file), "is not a file.", _WHERE)
    if file.suffix == ".safetensors":
        raise SettingError("ckpt_path", str(file), "holds weights and no state of a run.", _PLAIN)
    try:
        # Mapped and not read: the tensors, read later by Lightning, are skipped. Only the zip format can be mapped.
        with warnings.catch_warnings():  # about odd formats; what is refused is said below
            warnings.simplefilter("ignore")
            content = torch.load(file, map_location="cpu", weights_only=not trusted, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # the file may hold anything
        raise SettingError(
            "ckpt_path",
            str(file),
            f"cannot be read ({type(error).__name__}).",
            "Give an undamaged checkpoint; one with pickled objects needs --weights_only false, if you trust its code.",
        ) from error
    if not isinstance(content, dict) or not content.keys() >= {"state_dict", "pytorch-lightning_version"}:
        raise SettingError("ckpt_path", str(file), "holds no state of a run.", _PLAIN)
    if resume and "optimizer_states" not in content:
        raise SettingError("ckpt_path", str(file), "holds weights and no state of the optimiser.", _PLAIN)


def _with(own: Callback, kind: type[Callback], given: Callback | list[Callback] | None) -> list[Callback]:
    """The callbacks given, and ``own`` where none of them is of its kind."""
    callbacks = [given] if isinstance(given, Callback) else list(given or [])
    return callbacks if any(isinstance(callback, kind) for callback in callbacks) else [*callbacks, own]


def _refuse_two_methods(files: Sequence[Any]) -> None:
    """A method's file says what the method needs and nothing of what another one had set.

    Raises:
        SettingError: There are two of ``configs/method/``.
    """
    methods = [str(file) for file in files if Path(str(file)).parent.name == "method"]
    if len(methods) > 1:
        raise SettingError(
            "config", methods, "are two methods: settings of the first would stay in the second.", "Give one of them."
        )


def _warn_of_start_weights(subcommand: str, checkpoint: str | None) -> None:
    if not checkpoint:
        rank_zero_warn(
            f"{subcommand} without --ckpt_path: the head is as it was initialised. --ckpt_path last takes the newest "
            "checkpoint of this configuration's runs."
        )


class FlopsCLI(LightningCLI):
    """Lightning's CLI with any LightningModule and any data module, TensorBoard under ``runs/``, and short errors."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's commands, and ``plan`` after ``fit``; with each the arguments that no user gives."""
        fit, *others = LightningCLI.subcommands().items()
        return dict([fit, ("plan", {"model", "datamodule"}), *others])

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Let the data decide how many classes the model tells apart, and look at them before the model is made."""
        parser.link_arguments(
            "data", "model.init_args.num_classes", compute_fn=self._checked_classes, apply_on="instantiate"
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, and explain what was refused.

        Raises:
            UsageError: The parser refused the arguments or a file.
        """
        given = cast("list[str]", args)  # main gives nothing else
        try:
            self.config = parser.parse_args(given)
        except argparse.ArgumentError as error:
            subcommand = next((arg for arg in given if arg in self.subcommands()), "")
            raise UsageError(explain(str(error), Context(given, subcommand, self._top(subcommand)))) from error

    def before_instantiate_classes(self) -> None:
        """Refuse a checkpoint that cannot be used, before minutes are spent.

        Raises:
            SettingError: ``ckpt_path`` is neither a checkpoint of Lightning nor a word that has a meaning here.
        """
        path = self._settings.get("ckpt_path")
        _refuse_two_methods(self._settings.get("config") or [])
        if self.subcommand in ("validate", "test", "predict") and path is None:
            start = self._settings["model"].get("init_args.checkpoint")
            _warn_of_start_weights(str(self.subcommand), start)
        if self.subcommand == "plan":
            refuse_checkpoint(path)
        if path == "best":
            raise SettingError("ckpt_path", path, "this process has trained nothing to take the best of.", _WHERE)
        if path == "last" or (path is None and self.subcommand == "fit" and started_again()):
            path = self._settings["ckpt_path"] = self._last(path)
        if path and path not in ("last", "hpc") and "://" not in path:
            trusted = self._settings.get("weights_only") is False
            _check_checkpoint(Path(path), resume=self.subcommand == "fit", trusted=trusted)

    def instantiate_classes(self) -> None:
        """Build data, model and trainer.

        Raises:
            SettingError: The configuration sets another number of classes than the data has.
            UsageError: A class refuses its settings, or needs a package that is not installed.
        """
        try:
            super().instantiate_classes()
        except (ValueError, ImportError) as error:
            cause = _cause(error)
            if isinstance(cause, _MISTAKES):
                raise
            raise UsageError(f"{cause} (FLOPS_TRACEBACK=1 shows where this was raised.)") from error
        model = self._settings["model"]
        given = model.get("init_args.num_classes")
        has = getattr(self.datamodule, "num_classes", given)
        if given is not None and given != has:
            raise SettingError(
                "model.init_args.num_classes",
                given,
                f"but the data has {has} classes.",
                "Leave it out: the data decides.",
            )

    def _checked_classes(self, data: LightningDataModule) -> Any:
        """Number of classes of a data module that has looked for what is missing or damaged, where it can.

        That comes before pretrained weights are fetched and a device is touched; not where the data is still to be
        fetched, or nothing is to be run.

        Raises:
            SettingError: The data set is not whole.
            DamagedImageError: An image is empty or cannot be read.
        """
        check = getattr(data, "check", None)
        if self.subcommand and callable(check) and not getattr(data, "download", False):
            check()
        return cast("Any", data).num_classes

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer; add TensorBoard in a folder of its own for every run, and what writes a table.

        That is a ``PredictionWriter`` for ``predict``; for ``test`` a ``ClassReport``, where the model counts classes.

        Each only where the configuration has none.
        """
        settings = self._settings["trainer"]
        if settings["logger"] in (None, True) and not settings["barebones"]:
            folder = settings["default_root_dir"]
            version = job_version(Path(folder) / self._run_name())
            kwargs["logger"] = TensorBoardLogger(folder, self._run_name(), version, default_hp_metric=False)
        if self.subcommand == "fit" and settings["enable_checkpointing"] is not False and not settings["barebones"]:
            given = self.config_init[self.subcommand]["trainer"]
            kwargs["plugins"] = with_checkpoint_io(given["plugins"])
            kwargs["callbacks"] = with_savers(given["callbacks"])
        if self.subcommand == "predict":
            given = self.config_init[self.subcommand]["trainer"]["callbacks"]
            kwargs["callbacks"] = _with(PredictionWriter(), BasePredictionWriter, given)
        if self.subcommand == "test" and class_counts(self.model) is not None:
            given = self.config_init[self.subcommand]["trainer"]["callbacks"]
            kwargs["callbacks"] = _with(ClassReport(), ClassReport, given)
        if self.subcommand != "plan":
            return super().instantiate_trainer(**kwargs)
        from flops_lightning.plan.measurement import callbacks_of

        # Lightning adds callbacks of its own to the list that it is given.
        own = dict(self.config_init[self.subcommand]["trainer"])
        own["callbacks"] = callbacks_of(own)
        trainer = cast("PlanningTrainer", super().instantiate_trainer(**kwargs))
        trainer.settings = own
        return trainer

    def _parse_ckpt_path(self) -> None:
        """Take settings from the command line and the files only, and from a checkpoint its state.

        Lightning's method of this name lets the settings saved in a checkpoint override those just given, in silence;
        nothing but overriding it turns that off.
        """

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
            raise SettingError("ckpt_path", word, f"there is no checkpoint under {runs or folder}.", _WHERE)
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
        # The copy that a run keeps of its own settings lies in runs/NAME/VERSION/config.yaml.
        names = [file.parent.parent.name if file.name == "config.yaml" else file.stem for file in files]
        # Asked before the model is made, if a checkpoint is looked for.
        return "+".join(names) or str(self._settings["model"]["class_path"]).rpartition(".")[2]

    def _top(self, subcommand: str) -> dict[str, Any]:
        """Type hints by name of the settings at the top of a configuration file."""
        method = inspect.signature(getattr(PlanningTrainer, subcommand)).parameters if subcommand else {}
        own = {name: Any for name in method if name not in {"self", *self.subcommands()[subcommand]}}
        parts = {"trainer": Trainer, "model": LightningModule, "data": LightningDataModule}
        return {"config": str, "seed_everything": int, **parts, **own}


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    """Whether a line of Lightning's log is about the run, and not about packages to install."""
    return "Tip: For seamless cloud" not in record.getMessage()


_CLI: dict[str, Any] = {
    "trainer_class": PlanningTrainer,
    "subclass_mode_model": True,
    "subclass_mode_data": True,
    "seed_everything_default": 0,
    "trainer_defaults": {"default_root_dir": RUNS},
    "auto_configure_optimizers": False,  # the task configures its optimiser; a second way would override it
}
_PARSER = {"exit_on_error": False, "allow_abbrev": False}  # an abbreviation would hide a misspelt setting


def build(args: Sequence[str]) -> FlopsCLI:
    """Seed everything and build model, data and trainer of a configuration without running it.

    Args:
        args: As after ``fit``: ``["--config", "configs/vit_tiny_digits.yaml", ...]``.

    Returns:
        The command line, with the attributes ``model``, ``datamodule`` and ``trainer``.

    Raises:
        UsageError: The parser, or a class, refused the arguments.
        SettingError: A setting does not fit.
    """
    return FlopsCLI(LightningModule, LightningDataModule, run=False, parser_kwargs=_PARSER, args=list(args), **_CLI)


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
    try:
        FlopsCLI(
            LightningModule,
            LightningDataModule,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={
                "description": "Train networks with forward passes only. Start with: "
                "python main.py fit --config configs/vit_tiny_digits.yaml",
                **_PARSER,
                **{subcommand: dict(_PARSER) for subcommand in FlopsCLI.subcommands()},
            },
            args=list(sys.argv[1:] if args is None else args),
            **_CLI,
        )
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
        sys.stderr.write(f"\nerror: {cause}\n")
        sys.exit(USAGE_ERROR)
