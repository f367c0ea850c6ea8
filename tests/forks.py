"""Processes as forks of one that has imported everything; a Python of its own takes seconds to do so."""

import multiprocessing
import os
import runpy
import sys
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
# One list for all tests, as a test process has one server. What is not installed is left out.
SERVER.set_forkserver_preload(
    [
        "flops_lightning.cli.command", "timm", "torchmetrics", "torchvision.transforms.v2", "torchdata", "scipy.stats",
        "sklearn.datasets", "sklearn.model_selection", "open_clip", "transformers", "peft", "tensorboard",
    ]
)  # fmt: skip


def python(
    arguments: Sequence[str], output: Path, *, threads: int = 1, environment: Mapping[str, str] | None = None
) -> BaseProcess:
    """Begin ``python ARGUMENTS`` (``-m MODULE ...`` or a file) here; what it says is added to the file ``output``."""
    settings = {**os.environ, **(environment or {})}
    process = SERVER.Process(target=_run, args=(tuple(arguments), str(output), threads, settings, str(Path.cwd())))
    process.start()
    return process


def _run(arguments: Sequence[str], output: str, threads: int, environment: Mapping[str, str], folder: str) -> None:
    import torch

    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    with Path(output).open("a", buffering=1) as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    torch.set_num_threads(threads)
    try:
        if arguments[0] == "-m":
            sys.argv = list(arguments[1:])
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(arguments)
            runpy.run_path(arguments[0], run_name="__main__")
    except Exception:  # as a Python of its own would end
        traceback.print_exc()
        sys.exit(1)
