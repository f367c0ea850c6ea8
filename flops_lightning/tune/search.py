"""The whole search: the width of the noise at each site first, then the learning rate with these widths."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from flops_lightning.errors import SettingError, check_at_least
from flops_lightning.plan.measurement import Settings
from flops_lightning.plan.trainer import callbacks_of
from flops_lightning.tasks import ForwardModule
from flops_lightning.tune.rate import RateSearch, Recorder, Start, find_rate, returning, short_fit
from flops_lightning.tune.sigma import SigmaSearch, find_sigmas


@dataclass(frozen=True)
class Tuned:
    """What was found; ``sigmas`` by the site's name."""

    sigmas: Mapping[str, SigmaSearch] = field(default_factory=dict)
    rate: RateSearch | None = None

    @property
    def widths(self) -> dict[str, float]:
        """The width that was chosen at each site, as ``strategy.set_sigmas`` takes it."""
        return {name: search.found for name, search in self.sigmas.items()}


def tune(
    task: LightningModule, datamodule: LightningDataModule | None, settings: Settings | None = None, *,
    rates: int = 8, steps: int = 40, widths: int = 10, batches: int = 3,
    say: Callable[[str], None] = lambda _: None,
) -> Tuned:  # fmt: skip
    """Find the width of the noise at each site and the learning rate of a task, which is as before when this returns.

    Args:
        task: A :class:`~flops_lightning.tasks.ForwardModule`.
        datamodule: Its data.
        settings: Arguments of the ``Trainer`` of the run that is tuned for: its allocator, precision, device.
        rates: Learning rates tried at first; 0: none is searched for.
        steps: Steps of the longer runs that try them; see :func:`~flops_lightning.tune.rate.find_rate`.
        widths: Widths tried at each site; 0: the widths stay.
        batches: Batches on which they are tried.
        say: Told of each part of the search.

    Raises:
        SettingError: The task is none of this package, several processes would train, or nothing is to be searched for.

    Example:
        >>> import torch
        >>> from flops_lightning import DigitsDataModule, ForwardImageClassifier, LikelihoodRatio
        >>> from flops_lightning.tune.search import tune
        >>> small = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}
        >>> task = ForwardImageClassifier(
        ...     model_name="vit_tiny_patch16_224", model_kwargs=small, num_classes=10, strategy=LikelihoodRatio(seed=0)
        ... )
        >>> quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
        >>> found = tune(task, DigitsDataModule(batch_size=32), quiet, rates=0, batches=1)
        >>> task.strategy.set_sigmas(found.widths)
        >>> all(1e-5 < sigma < 0.1 for sigma in found.widths.values())
        True
    """
    settings = {} if settings is None else settings
    if not rates and not widths:
        raise SettingError("rates", 0, "and widths 0 leave nothing to search for.", "Write rates: 8, or widths: 10.")
    if not isinstance(task, ForwardModule):
        problem = "is not a ForwardModule, so its settings cannot be tuned."
        raise SettingError("model", type(task).__name__, problem, "Tune a ForwardModule.")
    if task.strategy is None:
        raise SettingError("strategy", None, "training needs a strategy.", "Write, for example, LikelihoodRatio().")
    with returning(task, task.strategy):
        # Lightning adds callbacks of its own to the list that it is given.
        run = Trainer(**{**settings, "callbacks": callbacks_of(settings)})
        run.state.fn = TrainerFn.FITTING
        task.trainer = run
        task.configure_callbacks()  # refuses what a fit would refuse
    if run.world_size > 1:
        problem = "settings are tried in one process."
        remedy = "Write devices: 1, with the batch_size of the whole run if it fits."
        raise SettingError("trainer.devices", run.world_size, problem, remedy)
    given, found, rate = task.strategy.sigmas, dict[str, SigmaSearch](), None
    if widths and given:
        check_at_least("widths", widths, 3, "Write 10, or 0 to keep the widths.")
        check_at_least("batches", batches, 1)
        say(f"noise: {widths} widths at {', '.join(given)}")
        found = _find_sigmas(task, datamodule, run, settings, widths=widths, batches=batches)
    with returning(task, task.strategy):  # and to widths that were learned, which the others replace
        try:
            task.strategy.set_sigmas({name: search.found for name, search in found.items()})
            if rates:
                rate = find_rate(task, datamodule, run, settings, rates=rates, steps=steps, say=say)
        finally:
            task.strategy.set_sigmas(given)
    return Tuned(found, rate)


def _find_sigmas(
    task: ForwardModule, datamodule: LightningDataModule | None, run: Trainer, settings: Settings, *,
    widths: int, batches: int,
) -> dict[str, SigmaSearch]:  # fmt: skip
    assert task.strategy is not None
    with returning(task, task.strategy) as start:
        trial = _WidthTrial(start, batches, widths)
        short_fit(task, datamodule, run, settings, steps=batches, callback=trial)
    return trial.found


class _WidthTrial(Recorder):
    """Collects the first batches as training gets them, and tries widths on them with the weights of the start."""

    def __init__(self, start: Start, batches: int, widths: int) -> None:
        super().__init__()
        self.start, self.wanted, self.widths = start, batches, widths
        self.batches: list[Any] = []
        self.found: dict[str, SigmaSearch] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Collect, and search when there are enough."""
        task = self.start.task
        self.batches.append(task.split(batch))
        if len(self.batches) == self.wanted:
            self.start.weights()
            assert task.strategy is not None
            with trainer.precision_plugin.forward_context():
                self.found = find_sigmas(task.strategy, self.batches, widths=self.widths)


def text(tuned: Tuned) -> str:
    """Tables of what was tried and found, as plain text."""
    parts: list[str] = []
    if tuned.sigmas:
        rows = [["site", "sigma", "found", "resolved from", "cosine of halves", "found"]]
        for name, s in tuned.sigmas.items():
            widths = [f"{width:.2g}" for width in (s.given, s.found, s.least)]
            rows.append([name, *widths, f"{s.given_halves:.3f}", f"{s.found_halves:.3f}"])
        parts.append(_aligned(rows))
    if tuned.rate is not None:
        trials = sorted(tuned.rate.trials, key=lambda trial: (trial.steps, trial.rate))
        rows = [["learning rate", "steps", "loss of the last quarter"]]
        rows += [[f"{trial.rate:.2g}", str(trial.steps), f"{trial.loss:.4g}"] for trial in trials]
        parts += [_aligned(rows), f"learning rate: {tuned.rate.found:g} instead of {tuned.rate.given:g}"]
        if all(trial.loss >= trial.losses[0] for trial in trials):
            parts.append("No rate lowered the loss in so few steps: give more (--steps), or more queries.")
    return "\n\n".join(parts)


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ([row[0].ljust(widths[0]), *(v.rjust(w) for v, w in zip(row[1:], widths[1:], strict=True))] for row in rows)
    return "\n".join("  ".join(line).rstrip() for line in lines)
