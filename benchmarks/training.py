"""``python -m benchmarks.training``: where the time of real training steps goes; ``allocation``: of allocators alone.

A Lightning trainer runs ``ForwardImageClassifier`` with :class:`QueryAllocatorCallback` and TensorBoard, which is what
users run, and every step's time is split by phase. ``allocation`` is what happens in the callback: what it asks of the
network beside clean pass and pilots, the allocator's own search, what it learns, and its logging; traces are summed
with the queries (``accumulation``). ``rest`` is data, logging, the trainer, and what is too small to have a name.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader, TensorDataset

import flops_lightning as fl
from benchmarks.cases import PILOTS, VIT_BASE, site_specs
from benchmarks.harness import Record, Spread, alternate, at_least, command, finish, say, synchronizer, table
from flops_lightning.allocators import GaussianAllocator, QueryAllocator, QueryBudget, TraceSettings
from flops_lightning.callbacks import QueryAllocatorCallback
from flops_lightning.errors import SettingError
from flops_lightning.phases import PHASES, timed_phases
from flops_lightning.strategies import LikelihoodRatio, PilotSpec
from flops_lightning.tasks import ForwardImageClassifier

ALLOCATION = """Time of an allocation beside a clean pass through ViT-Base/16 at 224 pixels.

The clean pass of a batch is the least that any step at that size pays (with 20 queries at each of three groups and the
head a step takes more than 20 times that), so each share of it is an upper bound of the share of the step. Statistics
are random with the shapes of that batch; the time of the searches hardly depends on their values.
"""
SITES, QUERIES, FEATURES = 4, 20, 768
PREDICTORS = ("activation.1", "activation.2", "activation.3", "head_gradient", "output_gradient", "top_gradient")
WINDOW, ROUNDS = 9, 30
"""Rounds until the allocators' windows of batches are full, and timed rounds after them."""
PREDICTED = TraceSettings(source="prediction")
ALLOCATORS: Mapping[str, Callable[[], fl.QueryAllocator]] = {
    "equal": fl.EqualAllocator,
    "bernoulli": partial(fl.BernoulliAllocator, traces=PREDICTED),
    "gaussian, pathwise": partial(fl.GaussianAllocator, traces=PREDICTED),
    "gaussian, score": partial(fl.GaussianAllocator, traces=PREDICTED, gradient="score"),
    "gaussian, exact": partial(fl.GaussianAllocator, traces=PREDICTED, gradient="exact"),
    "optimal": partial(fl.OptimalAllocator, traces=PREDICTED),
    "cost-aware": partial(fl.CostAwareAllocator, traces=PREDICTED),
}

WARM_UP = 2
CONTENDERS: Mapping[str, tuple[Callable[[], QueryAllocator], int]] = {
    "equal": (ALLOCATORS["equal"], 0), "bernoulli": (ALLOCATORS["bernoulli"], 0),
    "gaussian": (ALLOCATORS["gaussian, pathwise"], 0), "gaussian, pilots": (GaussianAllocator, PILOTS),
    "optimal": (ALLOCATORS["optimal"], 0), "cost-aware": (ALLOCATORS["cost-aware"], 0),
}  # fmt: skip
"""By name: the allocator, and pilots of each sample at the highest group."""


def batch_statistics(batch: int, seed: int, device: torch.device) -> tuple[fl.SampleStatistics, fl.TraceObservation]:
    """Statistics of a batch, and what its queries might have shown."""
    generator = torch.Generator().manual_seed(seed)
    rand, randn = (partial(draw, generator=generator) for draw in (torch.rand, torch.randn))
    loss = rand(batch) * 3
    log_trace = 2 * loss + randn(batch)
    scatter = rand(SITES, batch) + 0.5
    predictors = {name: (log_trace + randn(batch)).exp().to(device) for name in PREDICTORS}
    known = fl.SampleStatistics(
        loss=loss.to(device), embedding=randn(batch, FEATURES).to(device), predictors=predictors,
        counted_costs=torch.tensor([0.67, 0.33, 0.001, 0.0], device=device), scale=torch.ones(SITES, device=device),
    )  # fmt: skip
    traces = (log_trace.exp() * scatter).to(device)
    return known, fl.TraceObservation(traces, torch.full_like(traces, QUERIES))


def allocations(allocator: fl.QueryAllocator, batch: int, device: torch.device) -> Callable[[], object]:
    """One allocation after the other, learning included, each for a batch of its own."""
    batches = iter([batch_statistics(batch, seed, device) for seed in range(1 + WINDOW + ROUNDS)])

    def run() -> None:
        known, seen = next(batches)
        allocator.allocate(known, QueryBudget((QUERIES,) * SITES))
        if allocator.learns:
            allocator.observe(seen)

    return run


@torch.no_grad()
def allocation(argv: Sequence[str]) -> None:
    options = command("benchmarks.training allocation", f": {ALLOCATION}", device=True, batch=128).parse_args(argv)
    batch, device = options.batch, options.device
    network, images, _ = VIT_BASE.load(device, batch)
    passes = {"clean": lambda: [network.module(part) for part in images.split(16)]}
    whole = alternate(passes, rounds=1, synchronize=synchronizer(device)).seconds["clean"][0]
    contenders = {name: allocations(make(), batch, device) for name, make in ALLOCATORS.items()}
    seconds = alternate(contenders, rounds=WINDOW + ROUNDS, synchronize=synchronizer(device)).seconds
    times = {name: Spread.of(1e3 * each for each in seconds[name][WINDOW:]) for name in contenders}
    records = [{"allocator": name, "ms": ms, "share": ms.median / 1e3 / whole} for name, ms in times.items()]
    print(f"clean pass of {batch} images through ViT-Base/16 at 224 pixels: {whole:.2f} s\n")
    columns = {"allocator": "{allocator}", "ms per batch, median (quartiles)": "{ms:.1f}"}
    print(table(columns | {"share of the clean pass": "{share:.3%}"}, records))
    finish(options, [record | {"batch": batch, "clean_pass_seconds": whole} for record in records])


class StepClock(Callback):
    """Seconds of each step by phase, from the start of one batch to that of the next, loading of data included."""

    def __init__(self, seconds: dict[str, float], synchronize: Callable[[], object]) -> None:
        """Watch ``seconds``, those of :func:`timed_phases`; ``synchronize`` waits for the device."""
        self.seconds, self.synchronize = seconds, synchronize
        self._looks: list[dict[str, float]] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.synchronize()
        self._looks.append({**self.seconds, "step": time.perf_counter()})

    @property
    def steps(self) -> list[dict[str, float]]:
        """Seconds of each whole step under ``step``, and of its phases."""
        names = ("step", *PHASES)
        return [{n: after.get(n, 0.0) - before.get(n, 0.0) for n in names} for before, after in pairwise(self._looks)]


def train(name: str, options: argparse.Namespace, **model_kwargs: Any) -> list[dict[str, float]]:
    """Seconds by phase of the steps of a training run on random images, its first ones left out.

    ``name`` is of :data:`CONTENDERS`; ``options`` are those of the command, ``model_kwargs`` of its ViT. There are
    ``queries`` of each sample at each of the paper's three groups and the head.
    """
    torch.manual_seed(0)
    (make, pilots), batch, device = CONTENDERS[name], options.batch, options.device
    task = ForwardImageClassifier(model_name=options.model, num_classes=10, model_kwargs=model_kwargs)
    sites = site_specs(task.network, options.queries)
    spec = PilotSpec(sites[-2].name, queries=pilots) if pilots else None
    task.strategy = LikelihoodRatio(sites=sites, pilots=spec, chunk_rows=options.chunk_rows, seed=0)
    task.strategy.bind(task.network, task.loss)
    embedding: Any = task.backbone.patch_embed
    steps = WARM_UP + options.steps + 1
    images = torch.randn(batch * steps, embedding.proj.in_channels, *embedding.img_size)
    loader = DataLoader(TensorDataset(images, torch.arange(len(images)) % 10), batch_size=batch)
    synchronize = synchronizer(device)
    with tempfile.TemporaryDirectory() as folder, timed_phases(synchronize) as seconds:
        clock = StepClock(seconds, synchronize)
        trainer = Trainer(
            max_steps=steps, accelerator=device.type, devices=1, logger=TensorBoardLogger(folder),
            log_every_n_steps=1, callbacks=[clock, QueryAllocatorCallback(allocator=make())],
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(task, loader)
    return clock.steps[WARM_UP:]


def record(name: str, steps: Sequence[Mapping[str, float]]) -> Record:
    """Medians over the steps: seconds of a step, and shares of it by phase (``rest``: data, logging, the trainer)."""
    by_phase = [{str(phase): step[phase] / step["step"] for phase in PHASES} for step in steps]
    shares = [share | {"rest": 1 - sum(share.values())} for share in by_phase]
    beyond = [step["allocation"] / (step["step"] - step["pilots"]) for step in steps]
    return {
        "allocator": name, "seconds": statistics.median(step["step"] for step in steps),
        "shares": {part: statistics.median(share[part] for share in shares) for part in shares[0]},
        "allocation_share": statistics.median(beyond), "allocation_share_worst": max(beyond),
    }  # fmt: skip


def report(records: Sequence[Record]) -> str:
    columns = {"allocator": "{allocator}", "step, s": "{seconds:.2f}"}
    columns |= {name: f"{{shares[{name}]:.2%}}" for name in (*PHASES, "rest")}
    last = "allocation / step without pilots (worst)"
    return table(columns | {last: "{allocation_share:.2%} ({allocation_share_worst:.2%})"}, records)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print the table; after ``allocation`` that of the allocators alone."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["allocation"]:
        allocation(argv[1:])
        return
    parser = command("benchmarks.training", __doc__, device=True, batch=8, steps=5)
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="a timm ViT (default vit_tiny_patch16_224)")
    parser.add_argument(
        "--queries", type=at_least(2 + PILOTS), default=20, help="queries of a sample at each site (default 20)"
    )
    parser.add_argument("--chunk-rows", type=at_least(2), default=16, help="rows of a forward pass (default 16)")
    parser.add_argument("--names", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="allocators")
    options = parser.parse_args(argv)
    records = []
    for name in options.names:
        say(f"training with {name} ...")
        try:
            records.append(record(name, train(name, options)))
        except SettingError as error:
            parser.error(str(error))
    print(report(records))
    finish(options, records)


if __name__ == "__main__":
    main()
