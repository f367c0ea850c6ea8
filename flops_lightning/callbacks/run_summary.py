"""A run at a glance: test accuracy before and after, its cost, and where to look next."""

import json
import time
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset

from flops_lightning.callbacks.query_allocator import QueryAllocatorCallback
from flops_lightning.callbacks.tables import run_folder
from flops_lightning.distributed import Communicator, gather_plain, present_communicator
from flops_lightning.errors import SettingError
from flops_lightning.meter import QueryMeter
from flops_lightning.network.memory import peak_memory
from flops_lightning.strategies.base import ForwardGradientStrategy
from flops_lightning.tasks.causal_lm import ForwardCausalLM
from flops_lightning.tasks.classifier import ClassifierModule

FILE_NAME = "summary.json"
SITES_SHOWN = 6
SUMMARISED = (ClassifierModule, ForwardCausalLM)
"""Tasks of which a summary is written."""


class RunSummary(pl.Callback):
    """Test before and after training; print the comparison and write it to ``summary.json`` in the run's folder.

    Keys: ``start_accuracy``, ``test_accuracy``, ``steps``, ``samples`` (trained on, once each epoch), ``queries``,
    ``queries_per_sample`` (``queries / samples``), ``queries_by_site``, ``clean_passes``, ``forward_equivalents``,
    ``lost_queries``, ``train_seconds`` (validation included, the two tests left out), ``peak_memory_mb`` and
    ``peak_memory_of`` (see :func:`peak_memory`), ``strategy``, ``allocator``, ``seed``; with a service
    ``service`` (see :class:`~flops_lightning.service.Usage`). Of a language model nothing is tested, and ``validation``
    has what it logged last. Counts are those of all processes together, which share
    the test images; memory and time are those of the first. A trial run
    (``fast_dev_run``) writes nothing.

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

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Test before the first step, then start the clock."""
        if self._start_accuracy is None:
            self._start_accuracy = _test_accuracy(trainer, pl_module)
            if not isinstance(pl_module, ForwardCausalLM):
                rank_zero_info(f"test accuracy at the start: {_percent(self._start_accuracy)}")
        self._since = time.monotonic()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count samples; the meter's clean passes do not, since some strategies make none."""
        if isinstance(pl_module, ClassifierModule):
            self._samples += len(batch[1])
        elif isinstance(pl_module, ForwardCausalLM):
            self._samples += len(pl_module.split(batch)[0]["input_ids"])

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock, test, print and write."""
        self._seconds += time.monotonic() - self._since
        self._since = 0.0
        accuracy = _test_accuracy(trainer, pl_module)
        if not isinstance(pl_module, SUMMARISED) or pl_module.strategy is None:
            return
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
        }  # fmt: skip
        asked: Any = getattr(pl_module, "asked", dict)
        if of_service := asked():
            summary["service"] = of_service
        if isinstance(pl_module, ForwardCausalLM):
            logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
            own = {name.removeprefix("val/"): v for name, v in logged.items() if name.startswith("val/")}
            summary["validation"] = own
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
    before, after = _percent(summary["start_accuracy"]), _percent(summary["test_accuracy"])
    first = f"test accuracy        {after} (at the start {before})"
    if "validation" in summary:
        seen = ", ".join(f"{name} {value:.4g}" for name, value in summary["validation"].items())
        first = f"validation           {seen or 'none'}"
    return f"""
{first}
queries              {summary["queries"]:,} ({summary["queries_per_sample"]:g} a sample; {sites})
forward-equivalents  {summary["forward_equivalents"]:,.0f}
lost queries         {summary["lost_queries"]:,}
training time        {summary["train_seconds"]:.0f} s
strategy             {summary["strategy"]}, allocator {summary["allocator"]}"""


def _percent(share: float | None) -> str:
    return "unknown, there are no test images" if share is None else f"{share:.1%}"


@torch.no_grad()
def _test_accuracy(trainer: pl.Trainer, pl_module: pl.LightningModule) -> float | None:
    """Share of the data module's test images that are classified right; None without test data.

    The trainer's own test would run the hooks of all callbacks and loggers in the middle of a training run.
    """
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    if datamodule is None or isinstance(pl_module, ForwardCausalLM):
        return None
    try:
        datamodule.setup("test")
    except SettingError as error:  # a run may do without
        rank_zero_info(f"no test: {error}")
        return None
    training = [(m, m.training) for m in pl_module.modules()]
    pl_module.eval()
    ranks = present_communicator()
    counts = torch.zeros(2, dtype=torch.int64, device=pl_module.device)  # right, all
    split = getattr(pl_module, "split", tuple)
    for batch in _share(datamodule.test_dataloader(), ranks):
        images, labels = split(batch)
        converted = trainer.precision_plugin.convert_input(images.to(pl_module.device))
        with trainer.precision_plugin.forward_context():
            logits = nn.Module.__call__(pl_module, converted)
        counts += counts.new_tensor([int((logits.argmax(dim=1).cpu() == labels).sum()), len(labels)])
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
    own = Subset(loader.dataset, range(ranks.rank, len(loader.dataset), ranks.size))  # type: ignore[arg-type]
    return DataLoader(own, loader.batch_size, num_workers=loader.num_workers, collate_fn=loader.collate_fn)
