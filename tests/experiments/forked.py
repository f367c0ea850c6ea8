"""Runs of a study as forks of one process that has imported everything; a Python of its own takes seconds to do so."""

import multiprocessing
import os
import runpy
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import IO

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["flops_lightning.cli.command", "timm", "torchmetrics", "torchvision.transforms.v2"])


def run(_: object, command: Sequence[str], output: IO[str], threads: int) -> int:
    """What ``experiments.harness.Children.run`` does, as it does it but for the signals."""
    process = SERVER.Process(target=_main, args=(tuple(command[1:]), output.name, threads))
    process.start()
    process.join()
    return int(process.exitcode or 0)


def _main(arguments: Sequence[str], output: str, threads: int) -> None:
    import torch

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
