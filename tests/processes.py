"""Several processes of one run, started with the environment that torchrun sets."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def torchrun_environments(world_size: int) -> list[dict[str, str]]:
    """What torchrun adds to the environment of each rank, in order; they meet at a port that is free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]


def run_module(world_size: int, module: str, *arguments: str, seconds: float) -> None:
    """Run ``python -m MODULE ARGUMENTS`` in so many processes at once, to their end."""
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            command, env={**os.environ, **environment, **own}, cwd=ROOT, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for environment in torchrun_environments(world_size)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=seconds)[0].decode() for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(outputs)
