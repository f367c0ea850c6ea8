"""The first page of a run in TensorBoard: a card with its settings and budget, and the charts one looks at first."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from flops_lightning.protocol import QueryBudget

CHARTS = {
    "loss and accuracy": ["^(train|val)/(loss|accuracy)$"],
    "J against equal and optimal": ["^allocation/J_over_J_"],
    "counts": ["^allocation/count_(min|max)$"],
    "queries and compute": ["^queries/(total|forward_equivalents)$"],
}
"""Charts of the custom scalars page: title, and patterns of the curves in it."""


def tensorboard_writers(trainer: Trainer) -> list[Any]:
    """Summary writers of the trainer's TensorBoard loggers; empty on all processes but the first."""
    loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    return [logger.experiment for logger in loggers] if trainer.is_global_zero else []


def write_page(trainer: Trainer, settings: Mapping[str, Any], budget: QueryBudget | None = None) -> None:
    """Write the text card ``run`` and the layout of the custom scalars page to the trainer's TensorBoard loggers.

    Does nothing with other loggers. Call it once, for example in ``on_train_start``, with the settings of the run by
    name and its budget, if it has queries.
    """
    for writer in tensorboard_writers(trainer):
        writer.add_text("run", run_card(settings, budget), trainer.global_step)
        writer.add_custom_scalars({"run": {title: ["Multiline", curves] for title, curves in CHARTS.items()}})


def run_card(settings: Mapping[str, Any], budget: QueryBudget | None = None) -> str:
    """The text card, in Markdown: a table of the budget and one of the settings.

    Example:
        >>> print(run_card({"strategy": "SPSA"}, QueryBudget((20,), sites=("parameters",))))
        | site | queries per sample |
        |---|---|
        | parameters | 20 |
        <BLANKLINE>
        | setting | value |
        |---|---|
        | strategy | SPSA |
    """
    rows = {} if budget is None else dict(zip(budget.site_names, budget.queries_per_sample, strict=True))
    tables = [_table("site", "queries per sample", rows)] if rows else []
    return "\n\n".join([*tables, _table("setting", "value", settings)])


def _table(name: str, value: str, rows: Mapping[str, Any]) -> str:
    lines = [f"| {name} | {value} |", "|---|---|"]
    return "\n".join([*lines, *(f"| {key} | {each} |".replace("\n", " ") for key, each in rows.items())])
