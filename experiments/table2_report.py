"""The tables of :mod:`experiments.table2`, beside what the paper and others have published."""

import statistics
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from experiments.harness import Cell
from experiments.tables import markdown, mean_deviation, mean_interval, paired_difference, write_csv

DATA_SETS = ("imagenet", "caltech101", "food101")
MANUAL = {"manual": "manual, one template", "manual_ensembled": "manual, templates ensembled"}
START = "at the start"
TRAINED = {
    "lr": "LR", "spsa": "SPSA", "ops_lr": "OPS-LR", "ops_spsa": "OPS-SPSA", "cma_es": "CMA-ES",
    "bp": "BP (upper bound)",
}  # fmt: skip
METHODS = {**MANUAL, **TRAINED}
"""Titles by the name of the method's file in ``configs/prompt_method``."""
PAPER: dict[str, tuple[float, ...]] = {
    "manual": (57.9, 83.3, 76.4),
    "lr": (62.5, 87.4, 79.2),
    "spsa": (60.7, 85.3, 77.6),
    "ops_lr": (65.1, 90.5, 82.7),
    "ops_spsa": (64.2, 89.3, 81.5),
}
"""Test accuracies in percent by data set, Table 2 of the paper, which names ViT-B/32."""
OTHERS: dict[tuple[str, str], tuple[float, ...]] = {
    ("BPT-VLM, CMA-ES, best test accuracy seen on the way", "ViT-B/32"): (65.08, 94.16, 81.31),
    ("OpenAI's zero-shot, ensembled", "ViT-B/32"): (63.3, 87.6, 84.0),
    ("OpenAI's zero-shot, ensembled", "RN50"): (59.8, 83.3, 80.8),
}
"""By who and backbone: BPT-VLM's README, and open_clip's table of zero-shot results."""
PAIRS = (("ops_lr", "lr"), ("ops_spsa", "spsa"), ("lr", "spsa"), ("lr", "cma_es"), ("bp", "lr"))
"""Whose differences are reported, seed by seed."""
SPENT = ("image_passes", "text_passes", "calls")


class Key(NamedTuple):
    backbone: str
    data_set: str
    method: str
    seed: int


def spent(summary: Mapping[str, Any]) -> dict[str, float]:
    """Image passes and text passes of a run, the clean ones included, and calls of a service; none of backprop."""
    by_site = summary["queries_by_site"]
    if not by_site:
        return {}
    # A query of a joint site is both.
    image = sum(n for site, n in by_site.items() if site != "scores") + summary["clean_passes"]
    text = sum(n for site, n in by_site.items() if site != "image_prompt") + summary["steps"]
    calls = {"calls": summary["service"]["calls"]} if "service" in summary else {}
    return {"image_passes": image, "text_passes": text, **calls}


def report(fits: Mapping[Key, Cell], tests: Mapping[Key, Cell], keys: Sequence[Key], *, small: bool) -> str:
    """Markdown: of each data set a row for each backbone and method, then what others have published."""
    parts = []
    for data_set in dict.fromkeys(key.data_set for key in keys):
        place, rows = DATA_SETS.index(data_set), list[list[str]]()
        for backbone, method in dict.fromkeys(key[0:3:2] for key in keys if key.data_set == data_set):
            own = [key for key in keys if key[:3] == (backbone, data_set, method)]
            if method in TRAINED and [START, backbone] not in [row[:2] for row in rows]:
                rows.append([START, backbone, _at_start(fits, backbone, data_set), *"-----"])
            done = [tests[key].summary for key in own if key in tests and tests[key].finished]
            accuracy = mean_deviation([each["test_accuracy"] for each in done], len(own))
            loss = f"{statistics.fmean(each['test_loss'] for each in done):.3f}" if done else "-"
            paid = [spent(fits[key].summary) for key in own if key in fits and fits[key].finished]
            amounts = [
                f"{statistics.fmean(each[name] for each in paid):,.0f}" if paid and name in paid[0] else "-"
                for name in SPENT
            ]
            paper = f"{PAPER[method][place]:.1f}" if method in PAPER else "-"
            rows.append([METHODS[method], backbone, accuracy, loss, *amounts, paper])
        rows += [[who, backbone, *"-----", f"{values[place]:g}"] for (who, backbone), values in OTHERS.items()]
        title = f"{data_set}{' in small' if small else ''}, test accuracy in percent, mean ± sd over seeds:"
        columns = [
            "method",
            "backbone",
            "test accuracy",
            "test loss",
            *(name.replace("_", " ") for name in SPENT),
            "published",
        ]
        parts.append(f"{title}\n\n{markdown(columns, rows)}")
        if differences := _differences(tests, data_set):
            title = "Differences seed by seed, mean (95 % interval):"
            parts.append(f"{title}\n\n{markdown(['', 'backbone', 'accuracy, points', 'test loss'], differences)}")
    return "\n".join(parts)


def _differences(tests: Mapping[Key, Cell], data_set: str) -> list[list[str]]:
    """A row for each pair of methods that have been tested with the same seeds."""
    known = {key: cell.summary for key, cell in tests.items() if key.data_set == data_set and cell.finished}
    rows = []
    for backbone, (one, other) in product(dict.fromkeys(key.backbone for key in known), PAIRS):
        both = [
            (own, known.get(key._replace(method=other))) for key, own in known.items() if key[:3:2] == (backbone, one)
        ]
        pairs = [(own, base) for own, base in both if base is not None]
        if len(pairs) > 1:
            points = paired_difference(*([each["test_accuracy"] for each in side] for side in zip(*pairs, strict=True)))
            mean, low, high = mean_interval([own["test_loss"] - base["test_loss"] for own, base in pairs])
            name = f"{METHODS[one]} - {METHODS[other]}"
            rows.append([name, backbone, points, f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"])
    return rows


def _at_start(fits: Mapping[Key, Cell], backbone: str, data_set: str) -> str:
    """Before the first step: the same for all methods of a seed, of which one is asked."""
    known: dict[int, float | None] = {}
    for key, cell in fits.items():
        if key[:2] == (backbone, data_set) and known.get(key.seed) is None:
            known[key.seed] = cell.summary["start_accuracy"] if cell.finished else None
    return mean_deviation([value for value in known.values() if value is not None], len(known))


def write(
    fits: Mapping[Key, Cell], tests: Mapping[Key, Cell], keys: Sequence[Key], output: Path, *, small: bool
) -> None:
    """``table2.csv``, a row for each cell, and ``table2.md``."""
    rows = []
    for key in keys:
        trained = fits[key].summary if key in fits and fits[key].finished else {}
        result = tests[key].summary if key in tests and tests[key].finished else {}
        paid, paper = spent(trained) if trained else {}, PAPER.get(key.method)
        last = [trained.get(name) for name in ("start_accuracy", "test_accuracy", "steps", "train_seconds")]
        found = [result.get(name) for name in ("test_accuracy", "test_loss")]
        rows.append((*key, *found, *last, *map(paid.get, SPENT), paper and paper[DATA_SETS.index(key.data_set)]))
    columns = ("test_accuracy", "test_loss", "start_accuracy", "end_accuracy", "steps", "train_seconds")
    write_csv(output / "table2.csv", (*Key._fields, *columns, *SPENT, "paper"), rows)
    (output / "table2.md").write_text(report(fits, tests, keys, small=small))
