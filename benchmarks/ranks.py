"""``python -m benchmarks.ranks``: time and bytes of a step on several ranks, measured here and modelled for more.

Measured with processes of one thread, which meet in a gloo group on this machine; ``ranks_model.py`` models nodes of
several GPUs.
"""

import json
import os
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn

from benchmarks import ranks_model
from benchmarks.cases import DIGITS, VIT_MICRO, VIT_TINY, Case
from benchmarks.harness import CPU, Record, Spread, alternate, at_least, command, finish, positive, say
from benchmarks.ranks_model import METHODS, Method, StepLoad, by_scaling, efficiency, parameters_of
from flops_lightning.allocators.ranks import gather_observation, gather_statistics
from flops_lightning.distributed import Communicator, ProcessGroup, reduce_gradients
from flops_lightning.network.staging import stage_network
from flops_lightning.noise.keys import standard_normal
from flops_lightning.objectives import cross_entropy
from flops_lightning.strategies import SPSA, LikelihoodRatio


def perceptron() -> nn.Module:
    """Four layers on images of 8x8 pixels; small enough for a test of bytes."""
    layers = [nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, 32)]
    return nn.Sequential(nn.Flatten(), *(nn.Sequential(layer, nn.Tanh()) for layer in layers), nn.Linear(32, 10))


PERCEPTRON = Case("perceptron", perceptron, (1, 8, 8), 10, batch=64, queries=20, chunk_rows=128, rounds=5)
MODELS = {"perceptron": PERCEPTRON, "digits": DIGITS, "vit-micro": VIT_MICRO, "vit-tiny": VIT_TINY}


T = TypeVar("T")


class TimedGroup(ProcessGroup):
    """Counts the ``seconds`` within collectives, waiting for the other ranks included."""

    seconds = 0.0

    def sum(self, tensor: Tensor) -> Tensor:
        return self._timed(super().sum, tensor)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        return self._timed(super().gather, tensor)

    def _timed(self, collective: Callable[[Tensor], T], tensor: Tensor) -> T:
        start = time.perf_counter()
        result = collective(tensor)
        self.seconds += time.perf_counter() - start
        return result


def batch_of(case: Case, samples: int, ranks: int, rank: int) -> tuple[Tensor, Tensor]:
    """A rank's part of a batch that is the same however many ranks split it; ``samples`` of it are the rank's."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(samples * ranks, *case.image, generator=generator)
    targets = torch.randint(case.classes, (samples * ranks,), generator=generator)
    own = slice(rank * samples, (rank + 1) * samples)
    return inputs[own], targets[own]


def run_step(method: Method, strategy: LikelihoodRatio | SPSA, inputs: Tensor, targets: Tensor) -> None:
    """A step of this rank up to the gradients of all, without an optimiser."""
    strategy.network.module.zero_grad()
    ranks = strategy.communicator
    clean = strategy.clean_pass(inputs, targets)
    if method.allocated:
        gather_statistics(ranks, strategy.sample_statistics(clean))
    estimate = strategy.estimate(clean, traces=method.allocated)
    if estimate.observation is not None:
        gather_observation(ranks, estimate.observation)
    if method.exchange == "gradients":
        reduce_gradients(ranks, parameters_of(strategy), weight=len(inputs))


def measure_rank(case: Case, method: Method, samples: int, group: TimedGroup | Communicator) -> Record:
    """What this rank sees of a method: seconds of each round, bytes, passes, and its gradient."""
    torch.manual_seed(0)
    strategy = method.strategy(stage_network(case.build()), queries=case.queries, chunk_rows=case.chunk_rows)
    inputs, targets = batch_of(case, samples, group.size, group.rank)
    strategy.join(group)
    rows = min(len(inputs) if method.drawn else case.chunk_rows, case.chunk_rows)
    images = inputs.repeat(-(-rows // len(inputs)), 1, 1, 1)[:rows]
    flats = [torch.zeros(sum(p.numel() for p in site.parameters.values())) for site in strategy.sites]
    exchange: list[float] = []
    sent = group.sent  # what joining took

    def step() -> None:
        before = getattr(group, "seconds", 0.0)
        run_step(method, strategy, inputs, targets)
        exchange.append(getattr(group, "seconds", 0.0) - before)

    @torch.no_grad()
    def one_pass() -> None:
        cross_entropy(strategy.network.run(images), torch.zeros(rows, dtype=torch.long))

    @torch.no_grad()
    def draw() -> None:
        for seed, flat in enumerate(flats):
            flat.add_(standard_normal([seed], flat.shape, device=flat.device, dtype=flat.dtype)[0], alpha=1e-3)

    timed = alternate(
        {"step": step, "pass": one_pass, "draw": draw}, rounds=case.rounds,
        synchronize=dist.barrier if group.size > 1 else lambda: None,
    ).seconds  # fmt: skip
    gradient = torch.cat([p.grad.flatten() for p in parameters_of(strategy) if p.grad is not None])
    return {
        "method": method.name, "samples": samples, "seconds": timed["step"], "exchange": exchange[1:],
        "pass": [seconds / rows for seconds in timed["pass"]],
        "draw": [seconds / sum(flat.numel() for flat in flats) for seconds in timed["draw"]],
        "bytes": (group.sent - sent) / (1 + case.rounds),
        "forward_equivalents": strategy.meter.total().forward_equivalents / (1 + case.rounds),
        "gradient_norm": float(gradient.double().norm()), "gradient_bits": zlib.crc32(gradient.numpy().tobytes()),
    }  # fmt: skip


def _rank(rank: int, case: Case, sizes: Sequence[int], ranks: int, folder: str) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # gloo greets on stdout
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if ranks > 1:
        place = f"file://{folder}/meeting"
        dist.init_process_group("gloo", init_method=place, rank=rank, world_size=ranks, timeout=timedelta(minutes=10))
    group: Callable[[], TimedGroup | Communicator] = TimedGroup if ranks > 1 else Communicator
    found = [measure_rank(case, method, samples, group()) for method in METHODS for samples in sizes]
    Path(folder, f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    if ranks > 1:
        dist.destroy_process_group()


def launch(case: Case, sizes: Sequence[int], ranks: int) -> list[tuple[Record, ...]]:
    """For every method and number of samples what :func:`measure_rank` returned in each process."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_rank, (case, sizes, ranks, folder), ranks, daemon=True)
        found = [json.loads(Path(folder, f"{rank}.json").read_text(encoding="utf-8")) for rank in range(ranks)]
    return list(zip(*found, strict=True))


def summary(per_rank: Sequence[Record], load: StepLoad) -> Record:
    """What all ranks saw of the steps of one method, beside what the model counts.

    A step takes as long as its slowest rank; the rank that waits least tells the time of the exchange itself.
    """
    n, samples = len(per_rank), per_rank[0]["samples"]
    seconds, exchange, passes, draws = (
        np.array([rank[name] for rank in per_rank]) for name in ("seconds", "exchange", "pass", "draw")
    )
    one_pass, one_draw = float(np.median(passes.max(0))), float(np.median(draws.max(0)))
    drawn = load.drawn_numbers(samples, n)
    return {
        "kind": "measured", "method": per_rank[0]["method"], "ranks": n, "samples": samples, "sites": load.sites,
        "seconds": Spread.of(seconds.max(0)), "exchange_seconds": float(np.median(exchange.min(0))),
        "waiting_seconds": float(np.median(exchange.max(0))), "pass_seconds": one_pass, "draw_seconds": one_draw,
        "predicted_seconds": samples * load.sample * one_pass + drawn * one_draw,
        "bytes": max(rank["bytes"] for rank in per_rank), "model_bytes": load.bytes_sent(samples, n),
        "forward_equivalents": max(rank["forward_equivalents"] for rank in per_rank),
        "model_forward_equivalents": samples * load.sample, "drawn_numbers": drawn,
        "alike": len({rank["gradient_bits"] for rank in per_rank}) == 1,
        "gradient_norm": per_rank[0]["gradient_norm"],
    }  # fmt: skip


def measure(case: Case, ranks: Sequence[int]) -> list[Record]:
    """Records of every method, scaling and number of ranks; the batch is of all ranks (strong) or of each (weak)."""
    batch, cores = case.batch, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    known = {"model": case.model, "queries": case.queries, "rounds": case.rounds, "cores": cores, "backend": "gloo"}
    network, image, _ = case.load(CPU, 1)
    made = {m: m.strategy(network, queries=case.queries, chunk_rows=case.chunk_rows) for m in METHODS}
    loads = {method.name: method.load(strategy, image) for method, strategy in made.items()}
    records: list[Record] = []
    for n in ranks:
        say(f"measuring {n} rank(s) ...")
        for per_rank in launch(case, sorted({batch // n, batch}), n):
            record = known | summary(per_rank, loads[per_rank[0]["method"]])
            sizes = {"strong": batch // n, "weak": batch}
            records += [record | {"scaling": how} for how, size in sizes.items() if size == record["samples"]]
    alone = {(r["method"], r["scaling"]): r["seconds"].median for r in records if r["ranks"] == 1}
    for r in records:
        one = alone.get((r["method"], r["scaling"]))
        r["efficiency"] = one and efficiency(one, r["seconds"].median, r["ranks"], r["scaling"])
    return records


COLUMNS = {
    "method": "{method}", "ranks": "{ranks}{crowded}", "samples per rank": "{samples}", "step s": "{seconds:.4f}",
    "exchange s": "{exchange_seconds:.4f}", "passes + draws s": "{predicted_seconds:.4f}",
    "forward-equivalents per rank": "{forward_equivalents:.1f}", "bytes": "{bytes:.0f}",
    "bytes, model": "{model_bytes}", "alike": "{alike}", "efficiency": "{efficiency:.2f}{crowded}",
}  # fmt: skip


def report(records: Sequence[Record]) -> str:
    """Measured steps by scaling, and what may be read from them."""
    shown = [record | {"crowded": "*" * (record["ranks"] > record["cores"])} for record in records]
    crowded = "\n*: more ranks than cores, which take turns: a test of bytes and gradients, not of seconds."
    return (
        """MEASURED: {model}, {queries} queries per sample at each of {sites} sites, {rounds} rounds, gloo on this \
machine, one thread per rank, {cores} cores.
{tables}

step: median over the rounds (quartiles) of the slowest rank, up to the gradients of all; no optimiser.
exchange: within collectives, of the rank that waited least. passes + draws: forward-equivalents and drawn
numbers of a rank times the seconds of one pass and one number, taken in the same processes.
bytes: handed to collectives by a rank in a step. alike: the same gradients on all ranks, bit for bit.""".format(
            **records[0], tables=by_scaling(COLUMNS, shown)
        )
        + crowded * any(record["crowded"] for record in shown)
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser, count = command("benchmarks.ranks", __doc__, rounds=5), at_least(1)
    add = parser.add_argument
    add("--ranks", type=count, nargs="*", default=[1, 2, 4], help="processes to measure (default 1 2 4); none: no run")
    add("--model", choices=list(MODELS), default="digits", help="network to measure (default digits)")
    add("--batch", type=count, default=64, help="samples: of all ranks (strong) or of each (weak) (default 64)")
    add("--queries", type=count, default=20, help="queries of a sample at each site, an even number (default 20)")
    add("--modelled-ranks", type=count, nargs="*", default=[1, 8, 16, 64], help="ranks to model (default 1 8 16 64)")
    add("--modelled-batch", type=count, default=1024, help="samples of all modelled ranks (default 1024)")
    add("--ranks-per-node", type=count, default=8, help="GPUs of a node (default 8)")
    pair: dict[str, Any] = {"type": positive, "nargs": 2, "metavar": ("NODE", "NETWORK")}
    add("--bandwidth", default=[300.0, 25.0], **pair, help="GB/s of a link, one direction (assumed: 300 25)")
    add("--latency", default=[3.0, 10.0], **pair, help="microseconds of a message (assumed: 3 10)")
    add("--flops-per-second", type=positive, default=1e14, help="FLOPs/s of forward passes on a GPU (assumed: 1e14)")
    add("--draws-per-second", type=positive, default=5e10, help="random numbers/s, drawn and added (assumed: 5e10)")
    options = parser.parse_args(argv)
    for name, kind in (("batch", "ranks"), ("modelled_batch", "modelled_ranks")):
        for n in getattr(options, kind):
            if getattr(options, name) % n:
                given = f"--{name.replace('_', '-')} {getattr(options, name)}"
                parser.error(f"{given} cannot be split over {n} ranks. Write a multiple of the ranks.")
    if options.queries % 2:
        parser.error(f"--queries {options.queries} makes no antithetic pairs. Write an even number.")
    records: list[Record] = []
    if options.ranks:
        size = {name: getattr(options, name) for name in ("batch", "queries", "rounds")}
        records += measure(replace(MODELS[options.model], **size), options.ranks)
        print(report(records) + "\n")
    if options.modelled_ranks:
        model = ranks_model.modelled(options)
        print(ranks_model.report(model, options))
        records += model
    finish(options, records)


if __name__ == "__main__":
    main()
