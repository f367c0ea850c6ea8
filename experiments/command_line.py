"""Command lines: that of a study, and those of the runs it starts."""

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.harness import Cell, RunFailedError
from flops_lightning.errors import SettingError, check_at_least

LAUNCH = ("jobs", "threads", "dry_run")


def arguments(settings: Mapping[str, Any]) -> list[str]:
    """Settings as on the command line; lists and mappings as JSON."""
    texts = {name: json.dumps(v) if isinstance(v, (list, dict)) else str(v) for name, v in settings.items()}
    return [part for name, text in texts.items() for part in (f"--{name}", text)]


def configs(files: Sequence[str]) -> list[str]:
    """Configuration files as on the command line."""
    return [part for file in files for part in ("--config", file)]


def fit(
    study: Path, name: str, files: Sequence[str], extra: Sequence[str], settings: Mapping[str, Any], **cell: Any
) -> Cell:
    """A run of ``main.py fit``: ``settings`` overrule the user's ``extra`` arguments, and these the ``files``."""
    own = {"trainer.default_root_dir": study / name, "trainer.enable_progress_bar": "false", **settings}
    return Cell(study, name, ("main.py", "fit", *configs(files), *extra, *arguments(own)), **cell)


class StudyParser(argparse.ArgumentParser):
    """The command line of a study: its own options, then ``--`` and arguments for every run.

    Args:
        doc: Docstring of the study's module; its first line begins with the command in backticks.
        runs: Whether the study starts runs; then it has the options of ``run_all``.
        numbers: Options that are 1 or more, by name: their default and what they say.
    """

    def __init__(self, doc: str | None, *, runs: bool = True, **numbers: tuple[int, str]) -> None:
        summary = (doc or "").partition("\n")[0]
        command = re.search(r"python -m [\w.]+", summary)
        epilog = "Arguments after -- go to every run of main.py fit."
        super().__init__(prog=command[0] if command else None, description=summary, epilog=epilog)
        self.add_argument("--output", type=Path, required=True, help="folder of the study's files")
        if runs:
            numbers = {"jobs": (1, "runs at a time; they share the cores"), **numbers}
            self.add_argument("--dry_run", action="store_true", help="print the commands and run nothing")
        for name, (default, text) in numbers.items():
            self.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default {default})")
        self._numbers = list(numbers)

    def parse(self, args: Sequence[str] | None) -> argparse.Namespace:
        """Options of the study; ``extra``: what stands after ``--``; ``launch``: settings of ``run_all``."""
        given = list(sys.argv[1:] if args is None else args)
        end = given.index("--") if "--" in given else len(given)
        options = self.parse_args(given[:end])
        options.extra = tuple(given[end + 1 :])
        options.launch = {name: getattr(options, name) for name in LAUNCH if hasattr(options, name)}
        return options

    def run(self, study: Callable[[argparse.Namespace], None], args: Sequence[str] | None) -> None:
        """Make the study; a wrong setting and a failed run end the program with a message, with code 2 and 1."""
        options = self.parse(args)
        try:
            for name in self._numbers:
                check_at_least(f"--{name}", getattr(options, name), 1)
            if not Path("configs").is_dir():
                raise SettingError("folder", str(Path.cwd()), "has no configs.", "Run from the repository's root.")
            study(options)
        except SettingError as error:
            self.error(str(error))
        except RunFailedError as error:
            sys.exit(f"{self.prog}: {error}")
