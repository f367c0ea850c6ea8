"""How many rows a strategy runs in one forward pass: a given number, or as many as suit the device."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor

from flops_lightning.errors import SettingError
from flops_lightning.network.memory import fitting_rows, free_bytes, peak_bytes, rows_in
from flops_lightning.network.staging import StagedNetwork

RowsSetting = int | Literal["auto"]
AUTO: Literal["auto"] = "auto"
BEFORE_THE_FIRST_BATCH = 256


class ChunkRows:
    """The setting ``chunk_rows`` and its present value.

    Attributes:
        rows: Rows in one forward pass; with ``auto`` a guess until the first batch.
    """

    def __init__(self, setting: RowsSetting, *, least: int) -> None:
        """Check the setting.

        It is ``auto``, or a number of ``least`` or more.
        """
        if setting != AUTO and (not isinstance(setting, Integral) or setting < least):
            raise SettingError(
                "model.strategy.chunk_rows", setting, f"must be auto or a number, {least} or more.",
                f"Write {least} or more, for example 256, or auto.",
            )  # fmt: skip
        self._auto = self._open = setting == AUTO
        self.rows = BEFORE_THE_FIRST_BATCH if setting == AUTO else setting
        self._resumed: int | None = None

    @torch.no_grad()
    def settle(self, network: StagedNetwork, inputs: Tensor) -> None:
        """With ``auto``, at the first batch: choose by the memory of one row's inference and the free memory.

        A resumed run keeps the rows of the run that it continues, as long as they fit: other rows would round its sums
        in another order.
        """
        if not self._open or not len(inputs):
            return
        self._open = False
        with network.evaluating():
            # Two rows less one: the copies of the weights that autocast makes belong to no row.
            one, two = (peak_bytes(partial(network.run, inputs[:1].repeat_interleave(n, dim=0))) for n in (1, 2))
        row = max(1, two - one)
        free = free_bytes(inputs.device)
        self.rows = fitting_rows(row, inputs.device, free=free)
        if self._resumed is None:
            return
        if free is None or rows_in(free, row) >= self._resumed:
            self.rows = self._resumed
        else:
            warnings.warn(
                f"model.strategy.chunk_rows: the resumed run had chunks of {self._resumed} rows, which do not fit in "
                f"the free memory. It continues with {self.rows} and rounds sums in another order.", stacklevel=3,
            )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """The rows that were chosen; empty if the setting was a number."""
        chosen = self._resumed if self._open else self.rows
        return {"chunk_rows": chosen} if self._auto and chosen is not None else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._resumed = state.get("chunk_rows")
        self._open = self._auto
