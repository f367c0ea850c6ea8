"""``python -m benchmarks.training``: where the time of real training steps goes, callback included.

A Lightning trainer runs ``ForwardImageClassifier`` with :class:`QueryAllocatorCallback` and TensorBoard, which is what
users run, and every step's time is split by phase. ``allocation`` is what happens in the callback: what it asks of the
network beside clean pass and pilots, the allocator's own search, what it learns, and its logging; traces are summed
with the queries (``accumulation``). ``rest`` is data, logging, the trainer, and what is too small to have a name.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.allocation import ALLOCATORS
from benchmarks.cases import PILOTS
from benchmarks.harness import Record, at_least, command, finish, say, synchronizer, table
from flops_lightning.allocators import GaussianAllocator, QueryAllocator
from flops_lightning.callbacks import QueryAllocatorCallback
from flops_lightning.errors import SettingError
from flops_lightning.phases import PHASES, timed_phases
from flops_lightning.strategies import LikelihoodRatio, PilotSpec
from flops_lightning.strategies.site_specs import default_specs
from flops_lightning.tasks import ForwardImageClassifier

WARM_UP = 2

CONTENDERS: Mapping[str, tuple[Callable[[], QueryAllocator], int]] = {
    "equal": (ALLOCATORS["equal"], 0),
    "bernoulli": (ALLOCATORS["bernoulli"], 0),
    "gaussian": (ALLOCATORS["gaussian, pathwise"], 0),
    "gaussian, pilots": (GaussianAllocator, PILOTS),
    "optimal": (ALLOCATORS["optimal"], 0),
    "cost-aware": (ALLOCATORS["cost-aware"], 0),
}
"""By name: the allocator, and pilots of each sample at the highest group."""


class StepClock(Callback):
    """Seconds of each step by phase, from the start of one batch to that of the next, loading of data included."""

    def __init__(self, seconds: dict[str, float], synchronize: Callable[[], object]) -> None:
        """Watch ``seconds``, those of :func:`timed_phases`; ``synchronize`` waits for the device."""
        self.seconds, self.synchronize = seconds, synchronize
        self._looks: list[dict[str, float]] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Look at the clock."""
        self.synchronize()
        self._looks.append({**self.seconds, "step": time.perf_counter()})

    @property
    def steps(self) -> list[dict[str, float]]:
        """Seconds of each whole step under ``step``, and of its phases."""
        names = ("step", *PHASES)
        return [{n: after.get(n, 0.0) - before.get(n, 0.0) for n in names} for before, after in pairwise(self._looks)]


def train(
    name: str,
    *,
    model: str,
    batch: int,
    queries: int,
    chunk_rows: int,
    steps: int,
    device: torch.device,
    model_kwargs: dict[str, Any] | None = None,
) -> list[dict[str, float]]:
    """Seconds by phase of the steps of a training run on random images, its first ones left out.

    ``name`` is of :data:`CONTENDERS`, ``model`` a ViT of timm with ``model_kwargs``; there are ``queries`` of each
    sample at each of the paper's three groups and the head.
    """
    torch.manual_seed(0)
    make, pilots = CONTENDERS[name]
    task = ForwardImageClassifier(model_name=model, num_classes=10, model_kwargs=model_kwargs)
    sites = [replace(spec, queries_per_sample=queries) for spec in default_specs(task.network)]
    spec = PilotSpec(sites[-2].name, queries=pilots) if pilots else None
    task.strategy = LikelihoodRatio(sites=sites, pilots=spec, chunk_rows=chunk_rows, seed=0)
    task.strategy.bind(task.network, task.loss)
    embedding: Any = task.backbone.patch_embed
    number = batch * (WARM_UP + steps + 1)
    images = torch.randn(number, embedding.proj.in_channels, *embedding.img_size)
    loader = DataLoader(TensorDataset(images, torch.arange(number) % 10), batch_size=batch)
    synchronize = synchronizer(device)
    with tempfile.TemporaryDirectory() as folder, timed_phases(synchronize) as seconds:
        clock = StepClock(seconds, synchronize)
        trainer = Trainer(
            max_steps=WARM_UP + steps + 1, accelerator=device.type, devices=1, logger=TensorBoardLogger(folder),
            log_every_n_steps=1, callbacks=[clock, QueryAllocatorCallback(allocator=make())],
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(task, loader)
    return clock.steps[WARM_UP:]


def record(name: str, steps: Sequence[Mapping[str, float]]) -> Record:
    """Medians over the steps: seconds of a step, and shares of it by phase (``rest``: data, logging, the trainer)."""
    shares = {phase: statistics.median(step[phase] / step["step"] for step in steps) for phase in PHASES}
    rest = statistics.median(1 - sum(step[phase] for phase in PHASES) / step["step"] for step in steps)
    beyond = [step["allocation"] / (step["step"] - step["pilots"]) for step in steps]
    return {
        "allocator": name,
        "seconds": statistics.median(step["step"] for step in steps),
        "shares": {**shares, "rest": rest},
        "allocation_share": statistics.median(beyond),
        "allocation_share_worst": max(beyond),
    }


def report(records: Sequence[Record]) -> str:
    """Shares of a step by phase."""
    columns = {"allocator": "{allocator}", "step, s": "{seconds:.2f}"}
    columns |= {name: f"{{shares[{name}]:.2%}}" for name in (*PHASES, "rest")}
    last = "allocation / step without pilots (worst)"
    return table(columns | {last: "{allocation_share:.2%} ({allocation_share_worst:.2%})"}, records)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
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
            steps = train(
                name, model=options.model, batch=options.batch, queries=options.queries,
                chunk_rows=options.chunk_rows, steps=options.steps, device=options.device,
            )  # fmt: skip
        except SettingError as error:
            parser.error(str(error))
        records.append(record(name, steps))
    print(report(records))
    finish(options, records)


if __name__ == "__main__":
    main()
