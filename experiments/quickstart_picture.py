"""``python -m experiments.quickstart_picture --runs DIR --output FILE``: the README's picture.

Left: validation accuracy along the runs of ``experiments.quickstart``, median and range over the seeds.
Right: of one batch of turned test digits, those that the Gaussian allocator gives the most and the fewest queries with
the weights at the end of learning.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.quickstart import VARIANTS, Cell
from flops_lightning.allocators import GaussianAllocator, QueryBudget, SampleStatistics
from flops_lightning.datamodules import DigitsDataModule
from flops_lightning.errors import SettingError
from flops_lightning.tasks import ForwardImageClassifier


def accuracy_curves(runs: Path, cells: Sequence[Cell]) -> list[list[tuple[int, float]]]:
    """``val/accuracy`` by step of every cell, read from its TensorBoard events."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves = []
    for cell in cells:
        (events,) = cell.folder(runs).rglob("events.out.tfevents.*")
        reader = EventAccumulator(str(events))
        reader.Reload()
        curves.append([(event.step + 1, event.value) for event in reader.Scalars("val/accuracy")])
    return curves


def extreme_digits(checkpoint: Path, shown: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images ``(2 * shown, 8, 8)``, labels and counts of the samples with the most and the fewest queries."""
    task = ForwardImageClassifier.load_from_checkpoint(checkpoint, weights_only=True, map_location="cpu")
    data = DigitsDataModule(batch_size=64, rotation=40.0)
    data.setup("test")
    images, labels = next(iter(data.test_dataloader()))
    with torch.no_grad():
        logits = task(images)
        probability = logits.softmax(dim=1)
        error = probability - torch.nn.functional.one_hot(labels, 10)
    statistics_ = SampleStatistics(
        loss=task.loss(logits, labels),
        embedding=task.network.run(images, 0, len(task.network) - 1).detach(),
        trace=error.square().sum(dim=1),  # the squared gradient at the logits stands in for pilots
    )
    counts = GaussianAllocator().allocate(statistics_, QueryBudget((20,))).counts[0]
    order = counts.argsort(descending=True, stable=True)
    chosen = torch.cat([order[:shown], order[-shown:]])
    return images[chosen, 0], labels[chosen], counts[chosen]


def draw(runs: Path, seeds: int, output: Path) -> None:
    """Draw the picture.

    Raises:
        SettingError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise SettingError("matplotlib", None, "is not installed.", 'Run pip install -e ".[plots]".') from error
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(11, 4), layout="constrained")
    panels: Any = figure.subfigures(1, 2, width_ratios=[1.25, 1])
    left, right = panels
    _draw_curves(left.subplots(), runs, seeds)
    checkpoint = next(Cell("", (), 0).folder(runs).rglob("*.ckpt"))
    _draw_digits(right, *extreme_digits(checkpoint, shown=6))
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)


def _draw_curves(axes: Any, runs: Path, seeds: int) -> None:
    for variant, overlays in VARIANTS.items():
        curves = accuracy_curves(runs, [Cell(variant, overlays, seed) for seed in range(seeds)])
        steps = [step for step, _ in curves[0]]
        by_step = list(zip(*([value for _, value in curve] for curve in curves), strict=True))
        (line,) = axes.plot(steps, [100 * statistics.median(values) for values in by_step], label=variant)
        low, high = [100 * min(values) for values in by_step], [100 * max(values) for values in by_step]
        axes.fill_between(steps, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
    axes.set(xlabel="optimiser step", ylabel="validation accuracy, %", ylim=(0, 100))
    axes.set_title(f"digits turned by 40°, median and range of {seeds} seeds", fontsize=10)
    axes.legend(fontsize=8, loc="lower right")
    axes.grid(alpha=0.3)


def _draw_digits(figure: Any, images: Tensor, labels: Tensor, counts: Tensor) -> None:
    columns = len(images) // 2
    axes = figure.subplots(2, columns).ravel()
    for i, axis in enumerate(axes):
        axis.imshow(images[i], cmap="gray_r")
        axis.set_title(f"{int(counts[i])}", fontsize=11)
        axis.set_xlabel(f"a {int(labels[i])}", fontsize=9)
        axis.set(xticks=[], yticks=[])
    figure.suptitle("queries of the hardest and the easiest of 64 samples (20 on average)", fontsize=10)


def main(args: Sequence[str] | None = None) -> None:
    """Draw the picture from finished runs."""
    parser = argparse.ArgumentParser(prog="python -m experiments.quickstart_picture", description=__doc__)
    parser.add_argument("--runs", type=Path, required=True, help="--output of experiments.quickstart")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to N-1 (default 5)")
    parser.add_argument("--output", type=Path, default=Path("docs/quickstart.png"))
    options = parser.parse_args(args)
    draw(options.runs, options.seeds, options.output)
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
