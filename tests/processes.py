"""Several processes of one run, started with the environment that torchrun sets."""

import socket
import tempfile
from pathlib import Path

from tests.forks import python


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
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / str(rank) for rank in range(world_size)]
        processes = [
            python(["-m", module, *arguments], output, environment=environment)
            for output, environment in zip(outputs, torchrun_environments(world_size), strict=True)
        ]
        try:
            for process in processes:
                process.join(timeout=seconds)
            codes = [process.exitcode for process in processes]
            assert not any(code != 0 for code in codes), "\n".join([str(codes), *(o.read_text() for o in outputs)])
        finally:
            for process in processes:
                process.kill()
