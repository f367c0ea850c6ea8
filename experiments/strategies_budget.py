"""How many steps of a method a budget buys, and what is too much; pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from flops_lightning.plan.cost import Cost

BudgetKind = Literal["queries", "forward_equivalents"]
BUDGETS: Mapping[BudgetKind, str] = {
    "queries": "equal total queries",
    "forward_equivalents": "equal forward-equivalents",
}


@dataclass(frozen=True)
class Reference:
    """The run that fixes the budgets: its optimiser steps, the samples it saw, and what it spent."""

    steps: int
    samples: int
    queries: float
    forward_equivalents: float

    @classmethod
    def of(cls, summary: Mapping[str, Any]) -> Reference:
        """From the ``summary.json`` of the run."""
        return cls(**{name: summary[name] for name in ("steps", "samples", "queries", "forward_equivalents")})

    @property
    def samples_per_step(self) -> float:
        """On average: the last batch of an epoch may be smaller."""
        return self.samples / self.steps


@dataclass(frozen=True)
class Cell:
    """How a method is to spend a budget.

    Attributes:
        steps: Optimiser steps.
        reason: Why it is not run; empty where it is.
        note: What is to be said about it.
    """

    steps: int
    reason: str = ""
    note: str = ""


def steps_for(budget: BudgetKind, cost: Cost, reference: Reference) -> int:
    """Optimiser steps after which the method has spent what the reference spent, rounded; 0: it costs too much at once.

    A method that pays nothing of the kind (backprop has no queries) gets the steps of the reference.
    """
    each, once = (getattr(cost, name) for name in (budget, f"{budget}_once"))
    if each == 0:
        return reference.steps
    return max(0, round((getattr(reference, budget) - once) / (each * reference.samples_per_step)))


def cell(budget: BudgetKind, cost: Cost, reference: Reference, *, max_steps_factor: float, max_minutes: float) -> Cell:
    """Steps of a method under a budget, or why they are not made."""
    steps = steps_for(budget, cost, reference)
    minutes = (cost.seconds_once + steps * cost.seconds) / 60
    if not steps:
        return Cell(0, "the first step alone costs more than the budget")
    if steps > max_steps_factor * reference.steps:
        times = steps / reference.steps
        return Cell(steps, f"{steps:,} steps, {times:.0f} times those of the reference (limit {max_steps_factor:g})")
    if minutes > max_minutes:
        return Cell(steps, f"{steps:,} steps would take {minutes:.0f} minutes (limit {max_minutes:g})")
    return Cell(steps, note="no queries: as many steps as the reference" if getattr(cost, budget) == 0 else "")
