"""What a service was asked for."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from flops_lightning.errors import SpentQueriesError


@dataclass
class Usage:
    """Running totals of a service; ``calls = answered + retries + failed``.

    Attributes:
        calls: Requests that were sent, repetitions and those that only hand over images or class names included.
        rows: What was asked for, in rows: one image with its prompts, or one encoding of an image or of a text prompt.
            A row counts once, however often it was sent, also if it was lost in the end.
        text_passes: Text prompts that were encoded for them, each with all classes.
        retries: Requests without an answer that were sent again.
        failed: Requests without an answer that were given up.
        seconds: Time spent waiting for answers.

    Example:
        >>> usage = Usage()
        >>> usage.add(rows=8, text_passes=2, calls=1)
        >>> usage.rows, usage.state_dict()["calls"]
        (8, 1)
    """

    calls: int = 0
    rows: int = 0
    text_passes: int = 0
    retries: int = 0
    failed: int = 0
    seconds: float = 0.0

    def add(self, **amounts: float) -> None:
        """Add to the totals by name."""
        for name, amount in amounts.items():
            setattr(self, name, getattr(self, name) + amount)

    def check_room(self, rows: int, most: int) -> None:
        """Raise a :class:`SpentQueriesError` if so many more rows are over the limit ``most`` (0: there is none)."""
        if most and self.rows + rows > most:
            raise SpentQueriesError(self.rows, rows, most)

    def state_dict(self) -> dict[str, Any]:
        """Totals as plain numbers."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        for name, value in state.items():
            setattr(self, name, value)
