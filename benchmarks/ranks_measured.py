"""Steps of real processes, which meet in a gloo group on this machine, timed round by round."""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.measurement import row_cross_entropy
from benchmarks.ranks_methods import METHODS, MODELS, Method, batch_of, run_step, taught
from flops_lightning.distributed import Communicator, present_communicator
from flops_lightning.network.staging import stage_network
from flops_lightning.noise.keys import standard_normal
from flops_lightning.strategies import SPSA, LikelihoodRatio

Found = TypeVar("Found")
MODULE = "benchmarks.ranks_measured"
PATIENCE = timedelta(minutes=10)
"""How long a rank waits for another."""


class TimedCommunicator:
    """Hands everything on, and counts the seconds until it comes back.

    Attributes:
        seconds: Within collectives, waiting for the other ranks included.
    """

    def __init__(self, inner: Communicator) -> None:
        """Start at zero."""
        self.inner, self.rank, self.size, self.sent, self.seconds = inner, inner.rank, inner.size, inner.sent, 0.0

    def sum(self, tensor: Tensor) -> Tensor:
        """See :class:`Communicator`."""
        return self._timed(lambda: self.inner.sum(tensor))

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """See :class:`Communicator`."""
        return self._timed(lambda: self.inner.gather(tensor))

    def _timed(self, run: Callable[[], Found]) -> Found:
        start = time.perf_counter()
        found = run()
        self.seconds += time.perf_counter() - start
        self.sent = self.inner.sent
        return found


@dataclass(frozen=True)
class Job:
    """What every rank of a group runs.

    Attributes:
        model: Word of :data:`MODELS`.
        methods: Names of :data:`METHODS`.
        samples: Batches of a rank, each a size to be measured.
        queries: Of a sample at each site.
        rounds: Timed steps, after one that is not.
    """

    model: str
    methods: list[str]
    samples: list[int]
    queries: int
    rounds: int


def measure_rank(job: Job, communicator: Communicator) -> list[dict[str, Any]]:
    """What this rank saw: for each method and size the seconds of every round, bytes, passes, and its gradient."""
    records = []
    for name in job.methods:
        method = next(each for each in METHODS if each.name == name)
        for samples in job.samples:
            torch.manual_seed(0)
            case = MODELS[job.model]
            network = stage_network(case.build())
            strategy = method.strategy(network, queries=job.queries, chunk_rows=case.chunk_rows)
            batch = batch_of(case, samples, communicator.size, communicator.rank)
            records.append({"method": name, "samples": samples, **_rounds(job, method, strategy, batch, communicator)})
    return records


def _rounds(
    job: Job, method: Method, strategy: LikelihoodRatio | SPSA, batch: tuple[Tensor, Tensor], inner: Communicator
) -> dict[str, Any]:
    ranks = TimedCommunicator(inner)
    strategy.join(ranks)
    rows = len(batch[0]) if method.drawn else strategy.chunk_rows
    images = batch[0].repeat(-(-rows // len(batch[0])), 1, 1, 1)[: min(rows, strategy.chunk_rows)]
    run_step(method, strategy, *batch)
    found: dict[str, list[float]] = {"seconds": [], "exchange": [], "pass": [], "draw": []}
    sent, paid = ranks.sent, strategy.meter.total().forward_equivalents
    for _ in range(job.rounds):
        found["pass"].append(_seconds(lambda: _pass(strategy, images)) / len(images))
        found["draw"].append(_draw_seconds(strategy))
        before = ranks.seconds
        found["seconds"].append(_seconds(lambda: run_step(method, strategy, *batch)))
        found["exchange"].append(ranks.seconds - before)
    gradient = torch.cat([p.grad.flatten() for p in taught(strategy) if p.grad is not None])
    return {
        **found,
        "bytes": (ranks.sent - sent) / job.rounds,
        "forward_equivalents": (strategy.meter.total().forward_equivalents - paid) / job.rounds,
        "gradient_norm": float(gradient.double().norm()),
        "gradient_bits": zlib.crc32(gradient.numpy().tobytes()),
    }


@torch.no_grad()
def _pass(strategy: LikelihoodRatio | SPSA, images: Tensor) -> None:
    row_cross_entropy(strategy.network.run(images), torch.zeros(len(images), dtype=torch.long))


@torch.no_grad()
def _draw_seconds(strategy: LikelihoodRatio | SPSA) -> float:
    """Of a random number, drawn with those of its site and added to as many others."""
    flats = [torch.zeros(sum(p.numel() for p in site.parameters.values())) for site in strategy.sites]

    def draw() -> None:
        for seed, flat in enumerate(flats):
            z = standard_normal([seed], flat.shape, device=flat.device, dtype=flat.dtype)[0]
            flat.add_(z, alpha=1e-3)

    return _seconds(draw) / sum(flat.numel() for flat in flats)


def _seconds(run: Callable[[], object]) -> float:
    """From the moment at which all ranks are there."""
    if dist.is_initialized():
        dist.barrier()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def launch(job: Job, ranks: int) -> list[list[dict[str, Any]]]:
    """``[rank]`` what :func:`measure_rank` returned in each of so many processes of one thread.

    Raises:
        RuntimeError: a process failed; with the end of what it said.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-W", "ignore", "-m", MODULE, json.dumps(asdict(job)), str(ranks), str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as name, ExitStack() as opened:
        results = [Path(name) / f"{rank}.json" for rank in range(ranks)]
        logs = [opened.enter_context(open(path.with_suffix(".log"), "w+")) for path in results]  # noqa: PTH123
        children = [
            subprocess.Popen([*command, str(rank), str(path)], env=environment, stdout=log, stderr=log)
            for rank, (path, log) in enumerate(zip(results, logs, strict=True))
        ]
        try:
            _wait(children)
        finally:
            for child in children:
                child.kill()
                child.wait()
        for child, log in zip(children, logs, strict=True):
            if child.returncode > 0:
                log.seek(0)
                raise RuntimeError(f"One of {ranks} ranks failed: {log.read()[-2000:]}")
        return [json.loads(path.read_text(encoding="utf-8")) for path in results]


def _wait(children: Sequence[subprocess.Popen[bytes]]) -> None:
    # Until all are done or one has failed, for which the others would wait long.
    while any(child.poll() is None for child in children) and not any(child.poll() for child in children):
        time.sleep(0.05)


def main(argv: Sequence[str] | None = None) -> None:
    """One rank: its job, how many there are, where they meet, which one it is, where its records go."""
    parser = argparse.ArgumentParser()
    parser.add_argument("job", type=lambda text: Job(**json.loads(text)))
    for name in ("ranks", "port", "rank"):
        parser.add_argument(name, type=int)
    parser.add_argument("result", type=Path)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if options.ranks > 1:
        place = f"tcp://127.0.0.1:{options.port}"
        dist.init_process_group(
            "gloo", init_method=place, rank=options.rank, world_size=options.ranks, timeout=PATIENCE
        )  # fmt: skip
    options.result.write_text(json.dumps(measure_rank(options.job, present_communicator())), encoding="utf-8")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
