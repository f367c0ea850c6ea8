"""Lightning's Trainer with the command ``tune``."""

from pathlib import Path
from typing import TYPE_CHECKING, cast

from lightning.pytorch import LightningDataModule, LightningModule

from flops_lightning.errors import SettingError
from flops_lightning.plan.trainer import PlanningTrainer

if TYPE_CHECKING:
    from flops_lightning.tasks import ForwardModule


def check_tune(ckpt_path: str | None, output: str, *, overwrite: bool) -> Path:
    """The overlay's file; raises a :class:`SettingError` for one that is there already, and for a checkpoint."""
    if ckpt_path:
        problem = "settings are tried from the start of a run."
        raise SettingError("ckpt_path", ckpt_path, problem, "Leave it out, or set model.init_args.checkpoint.")
    file = Path(output)
    if file.suffix not in (".yaml", ".yml"):
        raise SettingError("output", output, "is not the name of a YAML file.", "Write, for example, tuned.yaml.")
    if file.exists() and not overwrite:
        raise SettingError("output", output, "is there already.", "Give another --output, or --overwrite true.")
    return file


class TuningTrainer(PlanningTrainer):
    """A Trainer that can also tell what a fit would cost, and find settings for it."""

    command = "TuningTrainer.tune"  # what was typed, for the head of the overlay

    def tune(
        self, model: LightningModule, datamodule: LightningDataModule | None = None, ckpt_path: str | None = None,
        weights_only: bool | None = None, output: str = "tuned.yaml", overwrite: bool = False, rates: int = 8,
        steps: int = 40, widths: int = 10, batches: int = 3,
    ) -> None:  # fmt: skip
        """Find the width of the noise at each site and the learning rate; print them and write an overlay for fit.

        Args:
            model: The task; it is as before afterwards.
            datamodule: Its data.
            ckpt_path: Not accepted: settings are tried from the start of a run.
            weights_only: Has no effect; accepted so that the settings of a fit can be given.
            output: The overlay; a picture of the search lies beside it.
            overwrite: Whether an overlay that is there may be replaced.
            rates: Learning rates tried at first, half a decade apart around that of the configuration; 0: none.
            steps: Steps of the runs that choose between the best of them; the first have half as many.
            widths: Widths tried at each site; 0: none.
            batches: Batches on which widths are tried.
        """
        file = check_tune(ckpt_path, output, overwrite=overwrite)
        from flops_lightning.tune.overlay import overlay
        from flops_lightning.tune.plot import draw
        from flops_lightning.tune.search import text, tune

        tuned = tune(
            model, datamodule, self.settings, rates=rates, steps=steps, widths=widths, batches=batches,
            say=lambda line: print(line, flush=True),
        )  # fmt: skip
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(overlay(cast("ForwardModule", model), tuned, command=self.command))
        print(f"\n{text(tuned)}\n\nwritten to {file}: add --config {file} to fit")
        picture = file.with_suffix(".png")
        try:
            draw(tuned, picture)
        except SettingError as error:
            print(f"no plot: {error}")
        else:
            print(f"plot: {picture}")
