"""``python -m benchmarks.training``: where the time of real training steps goes, callback included.

A Lightning trainer runs ``ForwardImageClassifier`` with :class:`QueryAllocatorCallback` and TensorBoard, which is what
users run, and every step's time is split by phase. ``allocation`` is what happens in the callback: what it asks of the
network beside clean pass and pilots, the allocator's own search, what it learns, and its logging; traces are summed
with the queries (``accumulation``). ``rest`` is data, logging, the trainer, and what is too small to have a name.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.allocation import ALLOCATORS
from benchmarks.arguments import a_device, writable
from benchmarks.cases import PILOTS
from benchmarks.timing import waiting_for
from flops_lightning.allocators import GaussianAllocator, QueryAllocator
from flops_lightning.callbacks import QueryAllocatorCallback
from flops_lightning.errors import SettingError
from flops_lightning.phases import PHASES, timed_phases
from flops_lightning.strategies import LikelihoodRatio, PilotSpec
from flops_lightning.strategies.site_specs import default_specs
from flops_lightning.tasks import ForwardImageClassifier

WARM_UP = 2


@dataclass(frozen=True)
class Contender:
    """A way to choose counts.

    Attributes:
        make: The allocator.
        pilots: Pilots of each sample at the highest group.
    """

    make: Callable[[], QueryAllocator]
    pilots: int = 0


CONTENDERS = {
    "equal": Contender(ALLOCATORS["equal"]),
    "bernoulli": Contender(ALLOCATORS["bernoulli"]),
    "gaussian": Contender(ALLOCATORS["gaussian, pathwise"]),
    "gaussian, pilots": Contender(GaussianAllocator, PILOTS),
    "optimal": Contender(ALLOCATORS["optimal"]),
    "cost-aware": Contender(ALLOCATORS["cost-aware"]),
}


class StepClock(Callback):
    """Seconds of each step by phase, from the start of one batch to that of the next, loading of data included."""

    def __init__(self, seconds: dict[str, float], synchronize: Callable[[], object]) -> None:
        """Watch.

        Args:
            seconds: Of :func:`timed_phases`.
            synchronize: Waits for the device.
        """
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
        return [
            {name: after.get(name, 0.0) - before.get(name, 0.0) for name in names}
            for before, after in zip(self._looks, self._looks[1:], strict=False)
        ]


def train(
    contender: Contender,
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

    Args:
        contender: Who chooses the counts.
        model: Name of a timm ViT.
        batch: Samples in a batch.
        queries: Queries of each sample at each of the paper's three groups and the head.
        chunk_rows: Upper bound of rows in one forward pass.
        steps: Steps that count.
        device: Where.
        model_kwargs: Further settings of the ViT.
    """
    torch.manual_seed(0)
    task = ForwardImageClassifier(model_name=model, num_classes=10, model_kwargs=model_kwargs)
    specs = default_specs(task.network)
    for spec in specs:
        spec.queries_per_sample = queries
    pilots = PilotSpec(specs[-2].name, queries=contender.pilots) if contender.pilots else None
    task.strategy = LikelihoodRatio(sites=specs, pilots=pilots, chunk_rows=chunk_rows, seed=0)
    task.strategy.bind(task.network, task.loss)
    embedding: Any = task.backbone.patch_embed
    shape = (embedding.proj.in_channels, *embedding.img_size)
    number = batch * (WARM_UP + steps + 1)
    data = TensorDataset(torch.randn(number, *shape), torch.arange(number) % 10)
    synchronize = waiting_for(device)
    with tempfile.TemporaryDirectory() as folder, timed_phases(synchronize) as seconds:
        clock = StepClock(seconds, synchronize)
        trainer = Trainer(
            max_steps=WARM_UP + steps + 1, accelerator=device.type, devices=1, logger=TensorBoardLogger(folder),
            log_every_n_steps=1, callbacks=[clock, QueryAllocatorCallback(allocator=contender.make())],
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(task, DataLoader(data, batch_size=batch))
    return clock.steps[WARM_UP:]


def record(name: str, steps: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Medians over the steps: seconds of a step, and shares of it by phase (``rest``: data, logging, the trainer)."""
    shares = {phase: statistics.median(step[phase] / step["step"] for step in steps) for phase in PHASES}
    beyond = [step["allocation"] / (step["step"] - step["pilots"]) for step in steps]
    rest = statistics.median(1 - sum(step[phase] for phase in PHASES) / step["step"] for step in steps)
    return {
        "allocator": name,
        "seconds": statistics.median(step["step"] for step in steps),
        "shares": {**shares, "rest": rest},
        "allocation_share": statistics.median(beyond),
        "allocation_share_worst": max(beyond),
    }


def table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: shares of a step by phase."""
    names = (*PHASES, "rest")
    lines = [
        f"| allocator | step, s | {' | '.join(names)} | allocation / step without pilots (worst) |",
        "|---" * (len(names) + 3) + "|",
    ]
    for entry in records:
        shares = " | ".join(f"{entry['shares'][name]:.2%}" for name in names)
        worst = f"{entry['allocation_share']:.2%} ({entry['allocation_share_worst']:.2%})"
        lines.append(f"| {entry['allocator']} | {entry['seconds']:.2f} | {shares} | {worst} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    summary = (__doc__ or "").partition("\n")[0].partition(": ")[2]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=summary)
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="a timm ViT (default vit_tiny_patch16_224)")
    parser.add_argument("--batch", type=int, default=8, help="samples in a batch (default 8)")
    parser.add_argument("--queries", type=int, default=20, help="queries of a sample at each site (default 20)")
    parser.add_argument("--chunk-rows", type=int, default=16, help="rows of a forward pass (default 16)")
    parser.add_argument("--steps", type=int, default=5, help="steps that count (default 5)")
    parser.add_argument("--names", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="allocators")
    parser.add_argument("--device", type=a_device, default=torch.device("cpu"), help="cpu (default) or cuda")
    parser.add_argument("--json", type=writable, help="file for the figures")
    options = parser.parse_args(argv)
    for name in ("batch", "queries", "chunk_rows", "steps"):
        least = 1 if name in ("batch", "steps") else 2 + PILOTS * (name == "queries")
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)} is too small: write {least} or more.")
    records = []
    for name in options.names:
        print(f"training with {name} ...", file=sys.stderr, flush=True)
        try:
            steps = train(
                CONTENDERS[name], model=options.model, batch=options.batch, queries=options.queries,
                chunk_rows=options.chunk_rows, steps=options.steps, device=options.device,
            )  # fmt: skip
        except SettingError as error:
            parser.error(str(error))
        records.append(record(name, steps))
    print(table(records))
    if options.json:
        options.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
