"""A task whose losses come from a service: what it pays, where it stops, and what it goes on from."""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from flops_lightning.distributed import gather_plain, present_communicator
from flops_lightning.errors import LostQueriesError, SettingError, SpentQueriesError, check_whole
from flops_lightning.protocol import SampleStatistics
from flops_lightning.resume.signals import save_last
from flops_lightning.service.usage import Usage
from flops_lightning.strategies.base import ForwardGradientStrategy
from flops_lightning.tasks.forward_module import Batch, ForwardModule

KEY = "service"
"""Where a checkpoint keeps what the run has asked for."""


class Asked(Protocol):
    """Who scores: a scorer of prompts, or of captions."""

    max_queries: int

    @property
    def usage(self) -> Usage:
        """What was asked so far."""


class ServedModule(ForwardModule):
    """A :class:`ForwardModule` whose rows a service may score; without a service like any other.

    Logs ``service/calls``, ``service/rows`` and so on (see :class:`Usage`), totals over all parts of the run.
    """

    def __init__(self, *, max_queries: int = 0, **settings: Any) -> None:
        """Check the settings.

        Args:
            max_queries: Limit on the rows of the service, including those of validation and of all processes. The run
                stops before it with a checkpoint to continue from; 0: no limit.
            **settings: See :class:`ForwardModule`.
        """
        super().__init__(**settings)
        check_whole("max_queries", max_queries, 0, "Write 0 for no limit.")
        self.save_hyperparameters({"max_queries": max_queries})
        self.max_queries, self._last, self._most, self._next = max_queries, 0, 0, 0
        self._given_up: LostQueriesError | None = None

    @property
    @abstractmethod
    def scorer(self) -> Asked | None:
        """Who scores, if that is not done here."""

    @abstractmethod
    def step_rows(self, strategy: ForwardGradientStrategy, samples: int) -> int:
        """Rows that a step with so many samples asks for, where every sample has its equal share of the budget."""

    @abstractmethod
    def validation_rows(self, samples: int) -> int:
        """Rows that a validation with so many samples asks for."""

    def asked(self) -> dict[str, Any]:
        """What all processes have asked for together, by the names of :class:`Usage`; every process must call this."""
        own = {} if self.scorer is None else self.scorer.usage.state_dict()
        of_each = gather_plain(present_communicator(), own, device=self.device)
        return {name: sum(each[name] for each in of_each) for name in own}

    def report(self) -> dict[str, Any]:
        """See :meth:`ForwardModule.report`; with a service ``service``, what was asked of it."""
        return {**super().report(), **({"service": asked} if (asked := self.asked()) else {})}

    def setup(self, stage: str) -> None:
        """Refuse a limit that nothing counts towards, or that no step fits in, before a step is paid."""
        super().setup(stage)
        if self.max_queries and self.scorer is None:
            problem = "counts the rows of a service, but there is no service."
            raise SettingError("max_queries", self.max_queries, problem, "Write spend: {queries: ...}.")
        if stage == "fit" and self.max_queries and self.strategy is not None:
            rows = self._usual(self.strategy)
            if rows > self.max_queries:
                problem = f"is below one step, which takes {rows}."
                raise SettingError("max_queries", self.max_queries, problem, f"Write {rows} or more.")

    def _usual(self, strategy: ForwardGradientStrategy) -> int:
        """Rows of a step of all processes together, as far as the data tells the size of a batch."""
        samples, ranks = int(getattr(self.trainer.datamodule, "batch_size", 0) or 1), self.trainer.world_size  # type: ignore[attr-defined]
        return self.step_rows(strategy, max(1, samples // ranks)) * ranks

    def on_train_start(self) -> None:
        """Do not begin where nothing is left for a step, as where a run goes on with the limit that stopped it."""
        super().on_train_start()
        scorer, strategy = self.scorer, self.strategy
        if scorer is not None and strategy is not None and self.max_queries and not self._finished():
            (spent,), self._next = self._sums(scorer.usage.rows), self._usual(strategy)
            if spent + self._next > self.max_queries:
                raise SpentQueriesError(spent, self._next, self.max_queries)

    @contextmanager
    def _counted(self, scorer: Asked) -> Iterator[None]:
        """Inside, what is asked for belongs to the step at hand, and ends where the limit is."""
        # One of several processes would stop by itself, and the others wait for it: they agree after the step.
        before, scorer.max_queries = scorer.usage.rows, self.max_queries if self.trainer.world_size == 1 else 0
        try:
            yield
        finally:
            scorer.max_queries = 0
            self._last += scorer.usage.rows - before

    def sample_statistics(self, batch: Batch) -> SampleStatistics:
        """See :meth:`AllocatedModule.sample_statistics`; its clean pass and pilots are a part of the step."""
        scorer = self.scorer
        if scorer is None or self._trainer is None:
            return super().sample_statistics(batch)
        with self._counted(scorer):
            return super().sample_statistics(batch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """See :meth:`ForwardModule.training_step`; where too many steps in a row were lost, it ends with this one."""
        scorer = self.scorer
        if scorer is None:
            return super().training_step(batch, batch_idx)
        try:
            with self._counted(scorer):
                loss = super().training_step(batch, batch_idx)
        except LostQueriesError as error:
            self._given_up, loss = error, torch.tensor(torch.nan)
        named = {f"service/{name}": float(value) for name, value in scorer.usage.state_dict().items()}
        self.log_dict(named, sync_dist=self.trainer.world_size > 1, reduce_fx="sum")
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save and leave if the service has answered nothing for too long, or the next step would ask for too much."""
        super().on_train_batch_end(outputs, batch, batch_idx)
        scorer, strategy = self.scorer, self.strategy
        if scorer is None or strategy is None:
            return
        if self._given_up is not None:
            given_up, self._given_up = self._given_up, None
            path = save_last(self.trainer)
            raise LostQueriesError(f"{given_up} Saved {path}: --ckpt_path {path} goes on when the service answers.")
        last, self._last = self._last, 0
        if self.max_queries and not self._finished():
            usual = self.step_rows(strategy, len(batch[1]))
            spent, last, usual = self._sums(scorer.usage.rows, last, usual)
            self._most = max(self._most, last)
            self._next = max(self._most, usual)
            self._stop_before(spent, self._next)

    def on_validation_start(self) -> None:
        """Do not begin a validation that leaves too little for the next step; the run that goes on makes it up."""
        super().on_validation_start()
        scorer, trainer = self.scorer, cast("Any", self.trainer)
        if scorer is None or not self.max_queries or trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        rows = self.validation_rows(len(getattr(trainer.val_dataloaders, "sampler", ())))
        if rows:
            spent, rows = self._sums(scorer.usage.rows, rows)
            self._stop_before(spent, rows + (0 if self._finished() else self._next))

    def _sums(self, *numbers: int) -> list[int]:
        """Over all processes, each of which must call this."""
        found: list[int] = present_communicator().sum(torch.tensor(numbers, device=self.device)).tolist()
        return found

    def _stop_before(self, spent: int, rows: int) -> None:
        if spent + rows > self.max_queries:
            raise SpentQueriesError(spent, rows, self.max_queries, save_last(self.trainer))

    def _finished(self) -> bool:
        """Whether the step that ends was the run's last."""
        trainer = cast("Any", self.trainer)
        steps, epochs = trainer.max_steps, trainer.max_epochs
        last = trainer.is_last_batch and epochs not in (None, -1) and trainer.current_epoch + 1 >= epochs
        return bool(trainer.should_stop or last or 0 <= steps <= trainer.global_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what all processes have asked of the service."""
        super().on_save_checkpoint(checkpoint)
        if self.scorer is not None:
            checkpoint[KEY] = self.asked()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Count on from there, where training is resumed."""
        super().on_load_checkpoint(checkpoint)
        trainer = self._trainer
        first = present_communicator().rank == 0  # of several processes one goes on with the count of all
        if self.scorer is not None and trainer is not None and trainer.state.fn == "fit" and first:
            self.scorer.usage.add(**checkpoint.get(KEY, {}))  # beside the calls of this process, such as /info
