"""Lightning's Trainer with the command ``plan``."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from flops_lightning.errors import SettingError


def callbacks_of(settings: Mapping[str, Any]) -> list[Callback]:
    """The callbacks among a trainer's arguments, in a new list."""
    given = settings.get("callbacks")
    return [given] if isinstance(given, Callback) else list(given or [])


def refuse_checkpoint(path: str | None) -> None:
    """Raise a :class:`SettingError` if a checkpoint is given."""
    if path:
        raise SettingError("ckpt_path", path, "a plan covers a whole run.", "Leave it out: steps cost the same.")


class PlanningTrainer(Trainer):
    """A Trainer that can also tell beforehand what a fit would cost."""

    settings: Mapping[str, Any]  # the arguments it was made with

    def plan(
        self, model: LightningModule, datamodule: LightningDataModule | None = None, ckpt_path: str | None = None,
        weights_only: bool | None = None, seconds: float = 10.0, backprop: bool = True,
    ) -> None:  # fmt: skip
        """Measure a few training steps and print what a fit would cost: queries, time, memory, beside backprop.

        Args:
            model: The task; its weights change meanwhile.
            datamodule: Its data.
            ckpt_path: Not accepted: a plan covers a whole run.
            weights_only: Has no effect; accepted so that the settings of a fit can be given.
            seconds: How long steps are timed, with the run's own strategy and again with backprop.
            backprop: Whether to measure the same with backprop.
        """
        refuse_checkpoint(ckpt_path)
        from flops_lightning.plan.plan import make_plan, text

        print(text(make_plan(model, datamodule, self.settings, seconds=seconds, backprop=backprop)))
