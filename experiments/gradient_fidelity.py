"""``python -m experiments.gradient_fidelity --config FILE --output DIR``: cosines by layer and component.

For one matrix of a ViT's block at a time, the cosine of an estimate with backprop's gradient, as in figures 4 and 6 of
FLOPS (Ren et al., ICLR 2025): by layer (1 is next to the embedding), component, estimator, budget and allocator. It is
*predicted* from the exact derivatives of each batch at small sigma, without a draw (``predicted_cosine.py``); with
``--draws`` also *drawn* with equal counts, by forward passes with noise (``drawn_cosine.py``).

``--noise tensor`` perturbs the component's rows alone, ``module`` its whole layer (the fused qkv, and biases where
parameters are perturbed). The network is that of a configuration, at the start or during training with equal counts by
its own optimiser (``--at``), or a shape with random weights and noise for images (``--network``).

Allocators get pilots at the tensor itself, paid from the same budget and reused; pilots' traces scatter as those of so
many queries do. ``exact`` knows the traces. Equal counts are always there; with directions that a batch shares (spsa)
theorem 1 does not hold, and they are the only ones. Where a budget cannot pay for pilots there is no row.

Writes ``gradient_fidelity.csv``, ``.json``, ``.md`` and ``.png``. A batch with a zero gradient at a tensor is left out
there, and counted.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.command_line import StudyParser, configs
from experiments.components import MODULES, Component, batch_gradients, find_components
from experiments.drawn_cosine import Drawn, draw
from experiments.fidelity_allocation import ALLOCATORS, Allocators, Spent
from experiments.fidelity_tables import COLUMNS, report, row
from experiments.pictures import draw_if_possible
from experiments.pictures_fidelity import draw_fidelity
from experiments.predicted_cosine import predicted_cosine
from experiments.tables import write_csv, write_report
from experiments.training import EqualCountsRun
from flops_lightning.errors import SettingError, check_at_least, check_positive
from flops_lightning.network.staging import StagedNetwork, stage_network
from flops_lightning.objectives import cross_entropy
from flops_lightning.queries import LossFunction

Batch = tuple[Tensor, Tensor]
Place = tuple[int, StagedNetwork, LossFunction, list[Batch]]
"""Step, network, loss and batches."""
ESTIMATORS = ("lr", "spsa", "spsa_factored")
NETWORKS = {"vit_base": "vit_base_patch16_224", "vit_large": "vit_large_patch16_224"}
PRETRAINED = ".augreg_in21k"  # weights of the paper's backbones
CLASSES = 100
QUICK: dict[str, Any] = {"layers": [1], "budgets": [4, 8], "batch": 4, "batches": 2, "draws": 2}
PLAN = (
    "config", "network", "pretrained", "layers", "components", "budgets", "allocators", "estimators", "noise", "at",
    "batch", "batches", "draws", "sigma", "seed", "extra",
)  # fmt: skip


def places(options: argparse.Namespace) -> Iterator[Place]:
    """The network at every step of ``--at``, with batches of the training set that the seed and the step decide."""
    if options.network:
        yield _shape(options)
        return
    run = EqualCountsRun((*configs(options.config), *options.extra))
    if options.at[-1] > run.steps:
        remedy = "Write fewer, or train longer (-- --trainer.max_epochs N)."
        raise SettingError("--at", options.at[-1], f"the run has {run.steps} steps.", remedy)
    find_components(run.task.network, options.layers, options.components)  # refused before it trains
    left, number = list(options.at), options.batch * options.batches
    if number > len(run.data.train_set):
        problem = f"batches of {options.batch} need {number} images, and there are {len(run.data.train_set)}."
        raise SettingError("--batches", options.batches, problem, "Write fewer.")
    for step, batch in run.batches(0):
        if step == left[0]:
            order = run.shuffled(options.seed + step)
            batches = [run.images(part) for part in order[:number].split(options.batch)]
            yield left.pop(0), run.task.network, run.task.loss, batches
        if not left:
            return
        run.step(run.strategy.clean_pass(*batch))


def _shape(options: argparse.Namespace) -> Place:
    import timm

    torch.manual_seed(options.seed)
    name = NETWORKS[options.network] + (PRETRAINED if options.pretrained else "")
    module = timm.create_model(name, pretrained=options.pretrained, num_classes=CLASSES).eval()
    size, number = (3, 224, 224), options.batch
    batches = [(torch.randn(number, *size), torch.randint(CLASSES, (number,))) for _ in range(options.batches)]
    return 0, stage_network(module), cross_entropy, batches


def measure(place: Place, options: argparse.Namespace, bar: Any) -> Iterator[dict[str, Any]]:
    """Rows of the table at one step."""
    step, network, loss, batches = place
    components = find_components(network, options.layers, options.components)
    allocators = Allocators(options.allocators, seed=options.seed)
    spent: dict[tuple[Component, str, int, str], list[tuple[Spent, float]]] = defaultdict(list)
    drawn: dict[tuple[Component, str, int], list[tuple[Drawn, float]]] = defaultdict(list)
    left_out: dict[Component, int] = defaultdict(int)
    for i, batch in enumerate(batches):
        found = batch_gradients(network, loss, batch, components, noise=options.noise)
        for component, gradients in found.rows.items():
            bar.update()
            if gradients.zero:
                left_out[component] += 1
                continue
            rng = np.random.default_rng((options.seed, step, i, component.layer))
            for estimator in options.estimators:
                for each in allocators.spend(component, found, gradients, estimator, options.budgets, rng):
                    value = predicted_cosine(gradients, each.objective)
                    spent[component, estimator, each.budget, each.allocator].append((each, value))
                    if options.draws and each.allocator == "equal":
                        estimates = draw(
                            network, loss, batch, component, noise=options.noise, estimator=estimator,
                            queries=each.budget, draws=options.draws, sigma=options.sigma, seed=options.seed + i,
                            chunk_rows=options.chunk_rows,
                        )  # fmt: skip
                        drawn[component, estimator, each.budget].append((estimates, value))
    for component in components:
        if left_out[component] == len(batches):
            yield row(step, component, options, left_out=len(batches))
    for (component, estimator, budget, name), values in spent.items():
        estimates_of = drawn[component, estimator, budget] if name == "equal" else []
        yield row(
            step, component, options, estimator=estimator, budget=budget, allocator=name, spent=values,
            drawn=estimates_of, left_out=left_out[component],
        )  # fmt: skip


def study(options: argparse.Namespace) -> None:
    """Measure at every step, and write the tables and the picture."""
    from tqdm import tqdm

    check(options)
    rows: list[dict[str, Any]] = []
    output = options.output
    output.mkdir(parents=True, exist_ok=True)
    with tqdm(unit="gradient", desc="fidelity", mininterval=5.0, disable=None) as bar:
        for place in places(options):
            rows += measure(place, options, bar)
    settings = {name: getattr(options, name) for name in PLAN} | {"weights": weights(options)}
    (output / "gradient_fidelity.json").write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
    texts = [[f"{x:.6g}" if isinstance(x, float) else x for x in map(each.get, COLUMNS)] for each in rows]
    write_csv(output / "gradient_fidelity.csv", COLUMNS, texts)
    draw_if_possible(draw_fidelity, output)
    write_report(output / "gradient_fidelity.md", report(rows, weights(options)))


def weights(options: argparse.Namespace) -> str:
    """What network was measured, in words."""
    if not options.network:
        return "The network of " + " with ".join(options.config) + "."
    kind = "pretrained weights and a random head" if options.pretrained else "RANDOM weights"
    return f"The shape {NETWORKS[options.network]} with {kind}, normal noise for images and random labels."


def check(options: argparse.Namespace) -> None:
    """Refuse options that contradict each other; number ``--at``, and drop what is named twice."""
    if bool(options.config) == bool(options.network):
        both = "are two networks." if options.config else "there is no network."
        raise SettingError("--config, --network", (options.config, options.network), both, "Give one of the two.")
    if options.network:
        for name, value in (("--at", options.at != [0]), ("arguments after --", options.extra)):
            if value:
                problem = "goes with a configuration; a shape is not trained."
                raise SettingError(name, options.extra or options.at, problem, "Leave it out, or give --config.")
    elif options.pretrained:
        remedy = "Write -- --model.init_args.pretrained true."
        raise SettingError("--pretrained", True, "belongs to --network.", remedy)
    for name in ("components", "budgets", "allocators", "estimators", "layers"):
        setattr(options, name, list(dict.fromkeys(getattr(options, name))))
    paired = [name for name in options.estimators if name != "lr"]
    for budget in options.budgets:
        check_at_least("--budgets", budget, 2 if paired else 1)
        if paired and budget % 2:
            problem = f"is odd, and {paired[0]} spends its queries in pairs."
            raise SettingError("--budgets", budget, problem, f"Write {budget + 1}, or --estimators lr.")
    check_at_least("--draws", options.draws, 0)
    if options.draws == 1:
        raise SettingError("--draws", 1, "has no standard error.", "Write 2 or more, or 0 to predict only.")
    check_at_least("--seed", options.seed, 0)
    check_positive("--sigma", options.sigma, "Write, for example, 1e-4 (docs/precision.md).")


def steps(text: str) -> list[int]:
    """Type of ``--at``: ``start`` and numbers of steps, with commas."""
    parts = ["0" if part == "start" else part for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} must be steps with commas, for example start,60,240.")
    return sorted({int(part) for part in parts})


def main(args: Sequence[str] | None = None) -> None:
    batch = (32, "images of a batch")
    rows = (128, "rows of a forward pass with noise, at most")
    parser = StudyParser(__doc__, runs=False, batch=batch, batches=(4, "batches at each step"), chunk_rows=rows)
    add = parser.add_argument
    add("--config", action="append", default=[], help="configuration file; may be repeated")
    add("--network", choices=NETWORKS, help="a shape with random weights instead of a configuration")
    add("--pretrained", action="store_true", help="of --network: load timm's weights")
    add("--layers", type=int, nargs="+", default=[], help="blocks, 1 is next to the embedding (default all)")
    add("--components", nargs="+", default=["key", "fc1"], help=f"of {', '.join(MODULES)} (default key fc1)")
    add("--budgets", type=int, nargs="+", default=[4, 10, 20, 40, 80, 160], help="queries per sample")
    add("--allocators", nargs="+", choices=ALLOCATORS, default=list(ALLOCATORS), help="beside equal (default all)")
    add("--estimators", nargs="+", choices=ESTIMATORS, default=list(ESTIMATORS), help="default all")
    add("--noise", choices=("tensor", "module"), default="tensor", help="what is perturbed (default tensor)")
    add("--at", type=steps, default=[0], metavar="start,N,...", help="optimiser steps (default start)")
    add("--draws", type=int, default=0, help="estimates of each batch with equal counts (default 0: only predict)")
    add("--sigma", type=float, default=1e-4, help="width of the noise of draws (default 1e-4)")
    add("--seed", type=int, default=0, help="of batches, pilots, noise and random weights (default 0)")
    add("--quick", action="store_true", help=f"other defaults, to see that it works: {QUICK}")
    if "--quick" in (sys.argv[1:] if args is None else args):
        parser.set_defaults(**QUICK)
    parser.run(study, args)


if __name__ == "__main__":
    main()
