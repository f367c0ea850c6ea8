"""Runs that end by what they have spent, where steps do not cost the same, or because their steps come to nothing."""

import math
from dataclasses import dataclass

import torch

from flops_lightning.errors import LostQueriesError, check_at_least
from flops_lightning.strategies.base import ForwardGradientStrategy


@dataclass
class SpendSettings:
    """Ends a run by what all its processes have spent together; the trainer's own limits hold as well.

    A ``cosine`` schedule then follows the share that is spent, not the steps.

    Attributes:
        queries: Queries, as ``queries/total`` counts them; 0: no limit.
        forward_equivalents: Compute, as ``queries/forward_equivalents`` counts it; 0: no limit.
        clean_passes: Whether clean passes count as queries, as for a service that charges per call.

    Example:
        >>> SpendSettings(queries=150_000).limited
        True
    """

    queries: int = 0
    forward_equivalents: float = 0.0
    clean_passes: bool = False

    def check(self) -> None:
        """Raise a :class:`SettingError` for a limit below zero."""
        for name in ("queries", "forward_equivalents"):
            check_at_least(f"spend.{name}", getattr(self, name), 0, "Write 0 for no limit.")

    @property
    def limited(self) -> bool:
        """Whether there is a limit."""
        return bool(self.queries or self.forward_equivalents)

    def share(self, strategy: ForwardGradientStrategy) -> float:
        """Share of the nearest limit that the strategy's ranks have spent; all of them must ask. 0 without limits."""
        if not self.limited:
            return 0.0
        total = strategy.meter.total()
        queries = total.queries + (total.clean_passes if self.clean_passes else 0)
        device = next(strategy.network.module.parameters()).device
        spent = torch.tensor([queries, total.forward_equivalents], dtype=torch.float64, device=device)
        limits = (self.queries or math.inf, self.forward_equivalents or math.inf)
        return max(n / limit for n, limit in zip(strategy.communicator.sum(spent).tolist(), limits, strict=True))


def count_skipped(before: int, *, stepped: bool, most: int, unit: str, remedy: str) -> int:
    """Steps in a row without a gradient, after one more; ``unit`` is what the message calls them.

    Raises:
        LostQueriesError: There are more than ``most`` (``max_skipped_steps``).
    """
    skipped = 0 if stepped else before + 1
    if skipped > most:
        raise LostQueriesError(
            f"{skipped} {unit} in a row lost every query to non-finite losses (max_skipped_steps = {most}). {remedy}"
        )
    return skipped
