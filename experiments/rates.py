"""Learning rates, chosen for every arm of a study alike."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from experiments.harness import Cell, RunFailedError

TUNING_SEED = 1000  # of the runs that try learning rates; not used again
EXTENSIONS = 6  # of a grid of rates, at most


class Choice(NamedTuple):
    """A learning rate; NaN if all runs diverged. ``edge``: it is the least or the largest of those tried."""

    rate: float = math.nan
    edge: bool = False


def extended(grid: Sequence[float], best: float) -> list[float]:
    """A grid of two rates or more, with one more beyond ``best`` if that is at an edge: 1, 3, 10 goes on with 30."""
    inner = grid[1:] if len(grid) > 2 else grid  # ladders of 1, 3, 10 repeat after two rungs
    if best == grid[0]:
        return [float(f"{best * inner[0] / inner[1]:.3g}"), *grid]
    inner = grid[:-1] if len(grid) > 2 else grid
    if best == grid[-1]:
        return [*grid, float(f"{best * inner[-1] / inner[-2]:.3g}")]
    return list(grid)


def choose_rates(
    cells: Mapping[str, Callable[[float], Cell]],
    grids: Mapping[str, Sequence[float]],
    run: Callable[[Sequence[Cell]], bool],
    loss: Callable[[Cell], float] = lambda cell: cell.late_loss,
    *,
    required: bool = True,
) -> dict[str, Choice] | None:
    """The rate with the least loss for each arm, from a grid that goes on until that is not at its edge.

    Args:
        cells: By arm, the run that tries a rate.
        grids: By arm, the rates to begin with; a single one is chosen without a run.
        run: Runs cells, and returns whether all have finished (:func:`experiments.harness.run_all`).
        loss: Of a finished run; infinite where it diverged.
        required: Whether an arm may not be left without a rate.

    Returns:
        By arm; ``None`` if runs have not finished (``--dry_run``).

    Raises:
        RunFailedError: an arm diverged at every rate, and is ``required``.
    """
    tried = {name: sorted(set(grid)) for name, grid in grids.items()}
    losses: dict[str, dict[float, float]] = {name: {} for name in grids}
    best = {name: grid[0] for name, grid in tried.items()}
    for _ in range(EXTENSIONS + 1):
        left = [(n, rate) for n, grid in tried.items() for rate in grid if rate not in losses[n] and len(grid) > 1]
        if not left:
            break
        if not run([cells[name](rate) for name, rate in left]):
            return None
        for name, rate in left:
            losses[name][rate] = loss(cells[name](rate))
        for name in {name for name, _ in left}:
            best[name] = min(tried[name], key=losses[name].__getitem__)
            tried[name] = extended(tried[name], best[name])
    found = {}
    for name, rate in best.items():
        known = sorted(losses[name])
        diverged = math.isinf(losses[name].get(rate, 0.0))
        if diverged and required:
            raise RunFailedError(f"{name} diverged at every learning rate: {', '.join(f'{each:g}' for each in known)}")
        found[name] = Choice(math.nan if diverged else rate, rate in (*known[:1], *known[-1:]))
    return found
