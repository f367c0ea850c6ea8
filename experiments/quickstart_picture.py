"""``python -m experiments.quickstart_picture --runs DIR --output FILE``: the README's picture.

Left: validation accuracy along the runs of ``experiments.quickstart``, median and range over the seeds.
Right: of one batch of turned test digits, those that the Gaussian allocator gives the most and the fewest queries with
the weights at the end of training.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from experiments.pictures import pyplot
from experiments.quickstart import VARIANTS, cells
from flops_lightning.allocators import GaussianAllocator, QueryBudget, SampleStatistics
from flops_lightning.datamodules import DigitsDataModule
from flops_lightning.tasks import ForwardImageClassifier


def extreme_digits(checkpoint: Path, shown: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images ``(2 * shown, 8, 8)``, labels and counts of the samples with the most and the fewest queries."""
    task = ForwardImageClassifier.load_from_checkpoint(checkpoint, weights_only=True, map_location="cpu")
    data = DigitsDataModule(batch_size=64, rotation=40.0)
    data.setup("test")
    images, labels = next(iter(data.test_dataloader()))
    with torch.no_grad():
        logits = task(images)
        embedding = task.network.run(images, 0, len(task.network) - 1)
    error = logits.softmax(dim=1) - torch.nn.functional.one_hot(labels, 10)
    trace = error.square().sum(dim=1)  # the squared gradient at the logits stands in for pilots
    known = SampleStatistics(loss=task.loss(logits, labels), embedding=embedding, trace=trace)
    counts = GaussianAllocator().allocate(known, QueryBudget((20,))).counts[0]
    order = counts.argsort(descending=True, stable=True)
    extreme = torch.cat([order[:shown], order[-shown:]])
    return images[extreme, 0], labels[extreme], counts[extreme]


def draw(runs: Path, seeds: int, output: Path) -> None:
    figure = pyplot().figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1.25, 1])
    finished, axes = cells(runs, seeds), left.subplots()
    for variant in VARIANTS:
        curves = [cell.curve("val/accuracy") for (name, _), cell in finished.items() if name == variant]
        steps = [event.step + 1 for event in curves[0]]
        by_step = [[100 * event.value for event in events] for events in zip(*curves, strict=True)]
        (line,) = axes.plot(steps, [statistics.median(values) for values in by_step], label=variant)
        low, high = [min(values) for values in by_step], [max(values) for values in by_step]
        axes.fill_between(steps, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
    axes.set(xlabel="optimiser step", ylabel="validation accuracy, %", ylim=(0, 100))
    axes.set_title(f"digits turned by 40°, median and range of {seeds} seeds", fontsize=10)
    axes.legend(fontsize=8, loc="lower right")
    axes.grid(alpha=0.3)
    first = next(iter(finished.values()))
    images, labels, counts = extreme_digits(next(first.folder.rglob("*.ckpt")), shown=6)
    for i, axis in enumerate(right.subplots(2, len(images) // 2).flat):
        axis.imshow(images[i], cmap="gray_r")
        axis.set_title(f"{int(counts[i])}", fontsize=11)
        axis.set_xlabel(f"a {int(labels[i])}", fontsize=9)
        axis.set(xticks=[], yticks=[])
    right.suptitle("queries of the hardest and the easiest of 64 samples (20 on average)", fontsize=10)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.quickstart_picture", description=__doc__)
    parser.add_argument("--runs", type=Path, required=True, help="--output of experiments.quickstart")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to N-1 (default 5)")
    parser.add_argument("--output", type=Path, default=Path("docs/quickstart.png"))
    options = parser.parse_args(args)
    draw(options.runs, options.seeds, options.output)
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
