"""A run at a glance: what it has learned, its cost, and where to look next."""

import json
import time
from collections.abc import Iterable, Sized
from itertools import islice
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only
from torch.utils.data import DataLoader, IterableDataset, Subset

from flops_lightning.callbacks.query_allocator import QueryAllocatorCallback
from flops_lightning.callbacks.tables import run_folder
from flops_lightning.distributed import Communicator, gather_plain, present_communicator
from flops_lightning.errors import SettingError
from flops_lightning.meter import QueryMeter
from flops_lightning.network.memory import peak_memory
from flops_lightning.strategies.base import ForwardGradientStrategy
from flops_lightning.tasks.forward_module import ForwardModule

FILE_NAME = "summary.json"
SITES_SHOWN = 6


class RunSummary(pl.Callback):
    """Print what a run has learned and what it cost, and write it to ``summary.json`` in the run's folder.

    A classifier is tested before and after training.

    Keys: ``start_accuracy``, ``test_accuracy`` (None if nothing is tested), ``validation`` (the last logged
    ``val/...``), ``steps``, ``samples`` (training samples, counted once per epoch), ``queries``,
    ``queries_per_sample`` (``queries / samples``), ``queries_by_site``, ``clean_passes``, ``forward_equivalents``,
    ``lost_queries``, ``train_seconds`` (with validation, without the two tests), ``peak_memory_mb`` and
    ``peak_memory_of`` (see :func:`peak_memory`), ``strategy``, ``allocator``, ``seed``; with a service
    ``service`` (see :class:`~flops_lightning.service.Usage`). Counts are totals over all processes, which share the
    test images; memory and time are those of the first. A trial run (``fast_dev_run``) writes nothing.

    Example:
        >>> from flops_lightning.callbacks import RunSummary
        >>> RunSummary(export_weights=False).state_dict()  # what a resumed run continues from
        {'start_accuracy': None, 'samples': 0, 'seconds': 0.0}
    """

    def __init__(self, *, export_weights: bool = True) -> None:
        """``export_weights``: also write what was trained, such as plain timm weights in ``model.safetensors``."""
        self.export_weights = export_weights
        self._start_accuracy: float | None = None
        self._samples_before = 0  # the run was resumed; of all ranks
        self._samples = 0
        self._seconds = 0.0
        self._since = 0.0

    def state_dict(self) -> dict[str, Any]:
        """What the summary of a resumed run needs of the run's beginning."""
        elapsed = time.monotonic() - self._since if self._since else 0.0
        return {
            "start_accuracy": self._start_accuracy,
            "samples": self._samples_before + self._samples,
            "seconds": self._seconds + elapsed,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._start_accuracy, self._seconds = state_dict["start_accuracy"], state_dict["seconds"]
        self._samples_before, self._samples = state_dict["samples"], 0

    def on_save_checkpoint(self, trainer: Any, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Count the samples of all ranks in the checkpoint, of which one rank's state becomes everybody's."""
        checkpoint["callbacks"][self.state_key]["samples"] = self._all_samples(pl_module.device)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a module of which there is nothing to tell."""
        if stage == "fit" and not isinstance(pl_module, ForwardModule):
            problem = f"{type(pl_module).__name__} is not a ForwardModule, so there are no queries to count."
            raise SettingError("trainer.callbacks", "RunSummary", problem, "Remove the callback.")

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Test before the first step, then start the clock."""
        if self._start_accuracy is None:
            self._start_accuracy = _test_accuracy(trainer, pl_module)
            if self._start_accuracy is not None:
                rank_zero_info(f"test accuracy at the start: {self._start_accuracy:.1%}")
        self._since = time.monotonic()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count samples; the meter's clean passes do not, since some strategies make none."""
        self._samples = pl_module.samples

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Stop the clock, test, print and write."""
        self._seconds += time.monotonic() - self._since
        self._since = 0.0
        accuracy = _test_accuracy(trainer, pl_module)
        meter, strategy, device = QueryMeter(), pl_module.strategy, pl_module.device
        for state in gather_plain(present_communicator(), strategy.meter.state_dict(), device=device):
            meter.add_state(state)
        total, samples, (peak, where) = meter.total(), self._all_samples(device), peak_memory(device)
        allocators = [c for c in trainer.callbacks if isinstance(c, QueryAllocatorCallback)]  # type: ignore[attr-defined]
        summary: dict[str, Any] = {
            "start_accuracy": self._start_accuracy, "test_accuracy": accuracy, "steps": trainer.global_step,
            "samples": samples, "queries": total.queries,
            "queries_per_sample": round(total.queries / max(1, samples), 3),
            "queries_by_site": _queries_by_site(strategy, meter),
            "clean_passes": total.clean_passes,
            "forward_equivalents": round(total.forward_equivalents, 1), "lost_queries": total.lost,
            "train_seconds": round(self._seconds, 2), "peak_memory_mb": peak, "peak_memory_of": where,
            "strategy": type(strategy).__name__,
            "allocator": type(allocators[0].allocator).__name__ if allocators else "none", "seed": torch.initial_seed(),
            **pl_module.report(),
        }  # fmt: skip
        self._report(trainer, pl_module, summary, run_folder(trainer))

    def _all_samples(self, device: torch.device) -> int:
        return self._samples_before + sum(gather_plain(present_communicator(), self._samples, device=device))

    @rank_zero_only
    def _report(self, trainer: pl.Trainer, task: Any, summary: dict[str, Any], folder: Path) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_info(_text(summary))
            return
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE_NAME).write_text(json.dumps(summary, indent=2) + "\n")
        if self.export_weights:
            task.export_weights(str(folder / task.weights_name))
        curves = f"\nlook at the curves   tensorboard --logdir {folder.parent}" if trainer.loggers else ""
        rank_zero_info(_text(summary) + f"\nwritten to           {folder}" + curves)


def _queries_by_site(strategy: ForwardGradientStrategy, meter: QueryMeter) -> dict[str, int]:
    """Queries of the sites from bottom to top, then of whatever else was paid for."""
    paid = {name: count.queries for name, count in meter.sites.items() if count.queries}
    return {name: paid.get(name, 0) for name in (*(site.name for site in strategy.sites), *paid)}


def _text(summary: dict[str, Any]) -> str:
    by_site = summary["queries_by_site"]
    sites = ", ".join(f"{site} {queries:,}" for site, queries in by_site.items()) or "none"
    if len(by_site) > SITES_SHOWN:
        sites = f"{len(by_site)} sites, see {FILE_NAME}"
    if summary["test_accuracy"] is None:
        seen = ", ".join(f"{name} {value:.4g}" for name, value in summary["validation"].items())
        first = f"validation           {seen or 'none'}"
    else:
        first = f"test accuracy        {summary['test_accuracy']:.1%} (at the start {summary['start_accuracy']:.1%})"
    return f"""
{first}
queries              {summary["queries"]:,} ({summary["queries_per_sample"]:g} a sample; {sites})
forward-equivalents  {summary["forward_equivalents"]:,.0f}
lost queries         {summary["lost_queries"]:,}
training time        {summary["train_seconds"]:.0f} s
strategy             {summary["strategy"]}, allocator {summary["allocator"]}"""


@torch.no_grad()
def _test_accuracy(trainer: pl.Trainer, task: ForwardModule) -> float | None:
    """Share of the data module's test samples that are answered right; None where nothing can be counted.

    The trainer's own test would run the hooks of all callbacks and loggers in the middle of a training run.
    """
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    if datamodule is None or not task.tells_right:
        return None
    try:
        datamodule.setup("test")
    except SettingError as error:  # a run may do without
        rank_zero_info(f"no test: {error}")
        return None
    training = [(m, m.training) for m in task.modules()]
    task.eval()
    ranks = present_communicator()
    counts = torch.zeros(2, dtype=torch.int64, device=task.device)  # right, all
    for batch in _share(datamodule.test_dataloader(), ranks):
        moved = trainer.precision_plugin.convert_input(task.transfer_batch_to_device(batch, task.device, 0))
        with trainer.precision_plugin.forward_context():
            right = task.right(moved)
        counts += torch.stack([right.sum(), right.new_tensor(len(right), dtype=torch.int64)])
    for module, mode in training:
        module.training = mode
    right, images_seen = ranks.sum(counts).tolist()
    return right / images_seen if images_seen else None


def _share(loader: DataLoader[Any], ranks: Communicator) -> Iterable[Any]:
    """The batches of this rank, which together hold every image once."""
    if ranks.size == 1:
        return loader
    if isinstance(loader.dataset, IterableDataset) or loader.batch_size is None:
        return islice(loader, ranks.rank, None, ranks.size)
    own = Subset(loader.dataset, range(ranks.rank, len(cast("Sized", loader.dataset)), ranks.size))
    return DataLoader(own, loader.batch_size, num_workers=loader.num_workers, collate_fn=loader.collate_fn)
