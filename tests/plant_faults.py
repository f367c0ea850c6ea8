"""Plants the faults of ``tests/faults.md`` one by one, in a copy of the checkout, and sees that a test fails for each.

``python -m tests.plant_faults`` plants all of them, ``python -m tests.plant_faults 3 17`` two of them; ``--check`` only
looks whether the table fits: every piece of source occurs once in its file, every test exists.
"""

import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from collections import namedtuple
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = shutil.ignore_patterns(".git", ".*cache", ".venv", "venv", "__pycache__", "runs", "downloads", "*.egg-info")
SLOW_IMPORTS = ("torch", "torchvision.transforms.v2", "lightning.pytorch.cli", "timm", "torchdata", "sklearn.metrics")
Fault = namedtuple("Fault", ["number", "words", "file", "before", "after", "test"])


def read_faults(table: str) -> list[Fault]:
    """The lines of the table in markdown; a ``|`` within a cell has a backslash before it."""
    lines = [line.strip()[1:-1] for line in table.splitlines() if re.match(r"\|\s*\d", line)]
    rows = [[cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)] for line in lines]
    return [Fault(int(number), words, *(code.strip("`") for code in codes)) for number, words, *codes in rows]


def misfits(faults: Sequence[Fault], root: Path) -> list[str]:
    """Lines about faults whose piece of source does not occur exactly once in its file."""
    times = {f: (root / f.file).read_text().count(f.before) if (root / f.file).is_file() else 0 for f in faults}
    return [f"{f.number}: `{f.before}` occurs {n} times in {f.file}" for f, n in times.items() if n != 1]


def run_pytest(root: Path, *arguments: str) -> int:
    """Exit code of pytest on a checkout, slow tests included, in a fork that has the slow imports already."""

    def run() -> None:
        log = os.open(root / "plant_faults.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        os.chdir(root)
        # No bytecode: a file that changes twice within a second would not be read again.
        os.environ |= {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
        sys.dont_write_bytecode = True
        sys.path[:] = [str(root), *(path for path in sys.path if path not in ("", str(ROOT)))]
        sys.modules.pop("tests", None)
        os._exit(int(pytest.main(["-q", "-n", "0", "-p", "no:cacheprovider", "-m", "", *arguments])))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    return process.exitcode or 0


def plant(fault: Fault, root: Path) -> bool:
    """Whether the fault is caught, in a checkout that is put back afterwards."""
    path, start = root / fault.file, time.monotonic()
    source = path.read_text()
    try:
        path.write_text(source.replace(fault.before, fault.after))
        code = run_pytest(root, "-x", fault.test)
    finally:
        path.write_text(source)
    caught = code == pytest.ExitCode.TESTS_FAILED  # other codes: it passed, or could not run
    verdict = "caught" if caught else f"MISSED (pytest exits with {code})"
    print(f"{fault.number:3} {time.monotonic() - start:4.0f} s  {verdict}  {fault.words}", flush=True)
    return caught


def main(arguments: list[str]) -> str | None:
    """What is wrong: the table does not fit, a test fails without its fault, or faults are missed."""
    numbers, check = {int(each) for each in arguments if each.isdigit()}, "--check" in arguments
    faults = [f for f in read_faults((ROOT / "tests/faults.md").read_text()) if not numbers or f.number in numbers]
    for module in SLOW_IMPORTS:
        import_module(module)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(shutil.copytree(ROOT, Path(folder) / "checkout", ignore=LEFT_OUT))
        if wrong := misfits(faults, root):
            return "\n".join(wrong)
        if run_pytest(root, *(["--collect-only"] if check else []), *sorted({fault.test for fault in faults})):
            return (root / "plant_faults.log").read_text()[-5000:]
        missed = [] if check else [fault.number for fault in faults if not plant(fault, root)]
    print(f"{len(faults)} faults {'fit the code' if check else f'planted, {len(missed)} missed'}")
    return f"Missed: {missed}" if missed else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
