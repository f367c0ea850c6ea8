"""Image classification with a timm backbone that learns from forward passes."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from flops_lightning.distributed import gather_plain, present_communicator
from flops_lightning.errors import LostQueriesError, SettingError
from flops_lightning.network.staging import stage_network
from flops_lightning.objectives import Objective, dotted_path, find_objective, most_probable
from flops_lightning.optim.optimizers import (
    ClipSettings,
    OptimizerSettings,
    build_optimizer,
    build_schedule,
    clip_gradients,
    read_settings,
    squared_step_sizes,
)
from flops_lightning.phases import phase
from flops_lightning.protocol import SampleStatistics, TraceObservation
from flops_lightning.queries import CleanPass, row_losses
from flops_lightning.resume.loop_progress import settle_progress
from flops_lightning.resume.restore import obey_schedule, obey_settings, share_meters
from flops_lightning.resume.rules import check_classes, check_weights, class_names_of
from flops_lightning.resume.run_settings import describe_run
from flops_lightning.strategies.base import Estimate, ForwardGradientStrategy
from flops_lightning.tasks.backbone import check_images, create_backbone, load_weights, save_weights
from flops_lightning.tasks.backbone import freeze as freeze_parameters
from flops_lightning.tasks.evaluation import first_seen, metrics_of_test, metrics_of_validation
from flops_lightning.tasks.mean_gradient import MeanGradient
from flops_lightning.tasks.parameter_efficient import TargetSettings, apply_target, check_target_learns
from flops_lightning.tasks.trainer_checks import check_trainer
from flops_lightning.tensorboard import write_page

Batch = tuple[Tensor, Tensor]


class ForwardImageClassifier(pl.LightningModule):
    """A timm classifier trained by a :class:`ForwardGradientStrategy`.

    It offers ``sample_statistics`` and ``set_query_counts``, so a ``QueryAllocatorCallback`` can allocate its queries;
    without one every sample gets the same.
    """

    automatic_optimization = False

    def __init__(
        self,
        *,
        model_name: str,
        num_classes: int,
        strategy: ForwardGradientStrategy | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        pretrained: bool = False,
        checkpoint: str = "",
        target: TargetSettings | None = None,
        freeze: Sequence[str] = (),
        optimizer: OptimizerSettings | None = None,
        clip: ClipSettings | None = None,
        loss: str | Objective | None = None,
        label_smoothing: float = 0.0,
        max_skipped_steps: int = 10,
    ) -> None:
        """Build the backbone, stage it, and resolve the strategy against it.

        Args:
            model_name: A timm model whose class is ``VisionTransformer``.
            num_classes: Number of classes (the CLI takes it from the data).
            strategy: How gradients are estimated; None is enough to validate, test and predict.
            model_kwargs: Further arguments of ``timm.create_model`` (``img_size``, ``in_chans``, ``depth``, ...).
            pretrained: Start from timm's weights.
            checkpoint: Start from a local file instead (safetensors, or a plain ``torch.save``).
            target: Which parameters learn: all, or the few of a parameter-efficient target.
            freeze: Shell patterns of parameters that are not trained, for example ``["pos_embed", "blocks.0.*"]``.
            optimizer: Optimiser and schedule.
            clip: Gradient clipping.
            loss: What is minimised: a function ``(logits (r, c), target (r,)) -> (r,)`` or its dotted path, for example
                ``flops_lightning.objectives.zero_one_error``; None: cross-entropy. It needs no derivative.
            label_smoothing: Label smoothing of that cross-entropy, 0 to below 1.
            max_skipped_steps: Steps in a row that may lose all their queries before the run stops.

        Raises:
            SettingError: any of these does not fit, with the remedy.
        """
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise SettingError("label_smoothing", label_smoothing, "is not in [0, 1).", "Write for example 0.1.")
        if label_smoothing and loss is not None:
            raise SettingError(
                "label_smoothing", label_smoothing, "has no effect on a `loss` of your own.", "Remove one of the two."
            )
        if max_skipped_steps < 0:
            raise SettingError("max_skipped_steps", max_skipped_steps, "is negative.", "Write 0 or more.")
        if pretrained and checkpoint:
            raise SettingError("pretrained", True, "`checkpoint` is given as well.", "Choose one of the two.")
        self.optimizer_settings = read_settings("optimizer", OptimizerSettings, optimizer)
        self.clip_settings = read_settings("clip", ClipSettings, clip)
        self.target_settings = read_settings("target", TargetSettings, target)
        self.optimizer_settings.check()
        self._gradient = MeanGradient(self.optimizer_settings.accumulate_grad_batches)
        self.clip_settings.check()
        self.target_settings.check()
        self.objective = find_objective(loss) if isinstance(loss, str) else loss
        patterns = [freeze] if isinstance(freeze, str) else list(freeze)
        # Plain values only, so that checkpoints load with weights_only=True. The start weights are in the state_dict.
        self.save_hyperparameters(
            {
                "model_name": model_name,
                "num_classes": num_classes,
                "model_kwargs": dict(model_kwargs or {}),
                "target": asdict(self.target_settings),
                "freeze": patterns,
                "optimizer": asdict(self.optimizer_settings),
                "clip": asdict(self.clip_settings),
                "loss": None if self.objective is None else dotted_path(self.objective),
                "label_smoothing": label_smoothing,
                "max_skipped_steps": max_skipped_steps,
            }
        )
        self.backbone = create_backbone(model_name, model_kwargs or {}, num_classes=num_classes, pretrained=pretrained)
        if checkpoint:
            load_weights(self.backbone, checkpoint)
        apply_target(self.backbone, self.target_settings)
        freeze_parameters(self.backbone, patterns)
        check_target_learns(self.backbone, self.target_settings.kind, patterns)
        self.label_smoothing = label_smoothing
        self.max_skipped_steps = max_skipped_steps
        self.network = stage_network(self.backbone)
        self.strategy = strategy
        if strategy is not None:
            strategy.bind(self.network, self.loss)
        self.train_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.val_metrics = metrics_of_validation(num_classes)
        self.test_metrics = metrics_of_test(num_classes)
        self._clean: tuple[Tensor, CleanPass] | None = None
        self._counts: Tensor | None = None
        self._pilot_weights: Tensor | None = None
        self._requested: frozenset[str] = frozenset()
        self._observation: TraceObservation | None = None
        self._skipped = 0
        self._resumed = False
        self._gathered: dict[str, Any] = {}
        folder = str(Path(checkpoint).parent) if checkpoint else ""  # the same file may lie elsewhere by then
        self._start_weights = {
            "pretrained": pretrained,
            "checkpoint": Path(checkpoint).name,
            "checkpoint.folder": folder,
        }
        self._last_step: tuple[float, int] | None = None

    # -- the network ---------------------------------------------------------------------------------------------------

    def forward(self, images: Tensor) -> Tensor:
        """``(b, c)`` logits of ``(b, channel, h, w)`` images."""
        check_images(self.backbone, images)
        logits: Tensor = self.backbone(images)
        return logits

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """``(b,)`` losses: those of the setting ``loss``, or cross-entropies."""
        if self.objective is not None:
            return self.objective(logits, labels)
        return F.cross_entropy(logits, labels, reduction="none", label_smoothing=self.label_smoothing)

    @contextmanager
    def _loss_named(self) -> Iterator[None]:
        # To the strategy the loss is a method of this class; the user knows it by the name given in the settings.
        try:
            yield
        except SettingError as error:
            if error.setting != "loss" or self.objective is None:
                raise
            raise SettingError("loss", dotted_path(self.objective), error.problem, error.remedy) from error

    def export_weights(self, path: str) -> None:
        """Write the backbone's weights under timm's names, for use without this package.

        LoRA is merged into the weights; visual prompts are written as register tokens, so that the file is that of the
        same timm model with ``reg_tokens`` raised by their number.
        """
        save_weights(self.backbone, path)

    # -- what the allocator's callback asks for ------------------------------------------------------------------------

    def sample_statistics(self, batch: Batch) -> SampleStatistics:
        """Run the clean pass and the pilots; ``training_step`` reuses both.

        Raises:
            SettingError: the strategy has nothing to allocate; it says why.
        """
        strategy = self._strategy()
        metric = None
        if "preconditioned_scale" in self._requested:
            metric = squared_step_sizes(self._optimizer(), dict(self.backbone.named_parameters())) or None
        return strategy.sample_statistics(self._clean_pass(batch), self._requested, metric)

    def set_query_counts(self, counts: Tensor) -> None:
        """Take the ``(s, b)`` counts of the batch whose statistics were asked for."""
        self._counts = counts

    def set_pilot_weights(self, weights: Tensor) -> None:
        """Take the ``(s, b)`` weights of that batch's pilots."""
        self._pilot_weights = weights

    def request_statistics(self, names: frozenset[str]) -> None:
        """Take the names of the statistics that the allocator reads.

        Raises:
            SettingError: pilots are to be spent, and the allocator does not look at them.
        """
        pilots = getattr(self.strategy, "pilots", None)
        if pilots is not None and pilots.queries and "trace" not in names:
            raise SettingError(
                "strategy.pilots.queries", pilots.queries, "the allocator does not read what pilots show.",
                "Write 0, or let the allocator read it (traces: {source: both}, where it has traces).",
            )  # fmt: skip
        self._requested = names

    def trace_observation(self) -> TraceObservation | None:
        """Traces seen in the queries of the last step, where ``observation`` was requested."""
        return self._observation

    def _clean_pass(self, batch: Batch) -> CleanPass:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise SettingError("data", type(batch).__name__, "is no (images, labels) batch.", "Return such pairs.")
        images, labels = batch
        if self._clean is None or self._clean[0] is not images:
            check_images(self.backbone, images)
            with self._loss_named():
                strategy = self._strategy()
                rows = getattr(strategy, "chunk_rows", None)
                self._clean = (images, strategy.clean_pass(images, labels))
                chosen = getattr(strategy, "chunk_rows", None)
                if chosen != rows:
                    rank_zero_info(f"strategy.chunk_rows: auto is {chosen} here")
        return self._clean[1]

    def _strategy(self) -> ForwardGradientStrategy:
        if self.strategy is None:
            raise SettingError("strategy", None, "training needs one.", "Give for example LikelihoodRatio().")
        return self.strategy

    # -- training ------------------------------------------------------------------------------------------------------

    def configure_callbacks(self) -> list[pl.Callback]:
        """No callbacks; Lightning asks before it verifies or sets up anything, early enough to refuse its settings."""
        check_trainer(self.trainer)
        return []

    def configure_optimizers(self) -> Any:
        """The optimiser over the trainable parameters, and its schedule by step."""
        optimizer = build_optimizer(self.backbone, self.optimizer_settings)
        schedule = build_schedule(optimizer, self.optimizer_settings, self._total_steps())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "lr"}}

    def _total_steps(self) -> float:
        batches = self.trainer.estimated_stepping_batches  # counts a step a batch
        endless = self.trainer.max_epochs in (None, -1)  # then it is max_steps, or infinite
        if self._gradient.batches == 1 or endless or not math.isfinite(batches):
            return batches
        steps = math.ceil(self.trainer.num_training_batches / self._gradient.batches) * (self.trainer.max_epochs or 1)
        most = self.trainer.max_steps
        return steps if most < 0 else min(steps, most)

    def on_fit_start(self) -> None:
        """List what is not trained; check that pilots will be taken."""
        strategy = self._strategy()
        strategy.join(present_communicator())
        self._bind_anew(strategy)
        if self._gradient.batches > 1 and len(strategy.update_groups) > 1:
            raise SettingError(
                "optimizer.accumulate_grad_batches", self._gradient.batches, "makes one step of several batches, and "
                "update: site_by_site several steps of one.", "Write 1, or update: simultaneous.",
            )  # fmt: skip
        if self.network.frozen():
            rank_zero_info(f"frozen parameters: {', '.join(self.network.frozen())}")

    def _bind_anew(self, strategy: ForwardGradientStrategy) -> None:
        # A head replaced or parameters frozen since the task was made would go unnoticed otherwise.
        owned = {id(p) for site in (*strategy.sites, *strategy.exact_sites) for p in site.parameters.values()}
        if strategy.sites and owned != {id(p) for p in self.network.trainable().values()}:
            strategy.bind(self.network, self.loss)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Estimate the gradient from queries and step, once or (Algorithm 1) once for each site."""
        strategy = self._strategy()
        clean, counts, weights = self._clean_pass(batch), self._counts, self._pilot_weights
        self._clean = self._counts = self._pilot_weights = self._observation = None
        watched = "observation" in self._requested
        self._check_pilots(counts)
        # Only the last of several updates counts as a step of the trainer.
        counted, raw = self.optimizers(), self._optimizer()
        schedule = self.lr_schedulers()
        if isinstance(counted, list) or not isinstance(schedule, LRScheduler):
            raise TypeError("configure_optimizers gives one optimiser and one schedule.")
        groups = strategy.update_groups
        stepped = False
        for i, names in enumerate(groups):
            if i:
                clean = strategy.refresh(clean, groups[i - 1])
            with self._gradient.adding(self.network.trainable().values(), self._weight(batch)):
                estimate = strategy.estimate(clean, counts, names or None, pilot_weight=weights, traces=watched)
            self._observe(estimate)
            self._log_estimate(estimate, batch[1], first=i == 0)
            if not self._gradient.complete(last=self.trainer.is_last_batch):
                return
            reduced = self._gradient.reduce(strategy, self._taught(names))
            if reduced:
                norm = clip_gradients(self.backbone.named_parameters(), self.clip_settings)
                self.log(f"grad_norm/{names[0] if len(groups) > 1 else 'all'}", norm)
                with phase("optimiser"):
                    (counted if i == len(groups) - 1 else raw).step()
                stepped = True
        if stepped and not reduced:
            counted.zero_grad()
            counted.step()  # without gradients it changes nothing, and the trainer counts the step
        self._log_speed()
        self._count_skipped(stepped)
        if stepped:
            schedule.step()

    def _weight(self, batch: Batch) -> int:
        """Samples by which a batch counts in the gradient of its step."""
        strategy, samples = self._strategy(), len(batch[1])
        if strategy.exchange == "gradients" or self._gradient.batches == 1:
            return samples  # of this rank: the reduction weighs them
        return int(strategy.communicator.sum(torch.tensor([samples], device=self.device)))

    def _taught(self, names: Sequence[str]) -> list[nn.Parameter]:
        """Parameters that the sites with these names teach, in the same order on every rank; of all sites if empty."""
        strategy = self._strategy()
        sites = [site for site in (*strategy.sites, *strategy.exact_sites) if site.name in names]
        taught = {name for site in sites for name in site.parameters}
        return [p for name, p in self.network.trainable().items() if not sites or name in taught]

    def _optimizer(self) -> Optimizer:
        optimizer = self.optimizers(use_pl_optimizer=False)
        if not isinstance(optimizer, Optimizer):
            raise TypeError("configure_optimizers gives one optimiser.")
        return optimizer

    def _observe(self, estimate: Estimate) -> None:
        # Where sites are updated one by one, each estimate fills its own lines.
        seen, new = self._observation, estimate.observation
        self._observation = new if seen is None or new is None else seen.joined(new)

    def _check_pilots(self, counts: Tensor | None) -> None:
        pilots = getattr(self.strategy, "pilots", None)
        if counts is None and pilots is not None and pilots.queries:
            raise SettingError(
                "strategy.pilots.queries", pilots.queries, "no allocator asks for pilots.",
                "Add QueryAllocatorCallback to trainer.callbacks, or write 0.",
            )  # fmt: skip

    def _count_skipped(self, stepped: bool) -> None:
        self._skipped = 0 if stepped else self._skipped + 1
        if self._skipped > self.max_skipped_steps:
            raise LostQueriesError(
                f"{self._skipped} steps in a row lost every query to non-finite losses (max_skipped_steps = "
                f"{self.max_skipped_steps}). Lower optimizer.lr or the sites' sigma, or set clip.norm."
            )

    def _log_estimate(self, estimate: Estimate, labels: Tensor, *, first: bool) -> None:
        if first:
            self.train_accuracy(estimate.output, most_probable(labels))
            self.log("train/loss", estimate.loss.mean(), prog_bar=True, sync_dist=self.trainer.world_size > 1)
            self.log("train/accuracy", self.train_accuracy, prog_bar=True)
            self.log("train/lr", max(group["lr"] for group in self._optimizer().param_groups))
        total = self._strategy().meter.total()
        counted = {"total": total.queries, "lost": total.lost, "forward_equivalents": total.forward_equivalents}
        self._log_sums({f"queries/{name}": float(value) for name, value in counted.items()})

    def _log_sums(self, values: dict[str, float], **settings: Any) -> None:
        """Log sums over all processes; every process must come here."""
        self.log_dict(values, sync_dist=self.trainer.world_size > 1, reduce_fx="sum", **settings)

    def _log_speed(self) -> None:
        now, queries = time.monotonic(), self._strategy().meter.total().queries
        if self._last_step is not None:
            before, spent = self._last_step
            self._log_sums({"queries/per_second": (queries - spent) / max(now - before, 1e-9)}, prog_bar=True)
        self._last_step = (now, queries)

    def on_train_epoch_end(self) -> None:
        """Log the queries of every site."""
        strategy = self._strategy()
        for site in strategy.sites:
            self._log_sums({f"queries/{site.name}": float(strategy.meter.sites[site.name].queries)})

    # -- evaluation ----------------------------------------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log ``val/loss`` and ``val/accuracy``."""
        self._evaluate(batch, self.val_metrics)

    def on_test_epoch_start(self) -> None:
        """Forget what a test that was broken off has counted."""
        self.test_metrics.reset()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the :func:`metrics_of_test`, every image once whatever the number of processes."""
        own = first_seen(self.trainer.test_dataloaders, batch_idx, len(batch[1]))
        self._evaluate(batch, self.test_metrics, own)

    def _evaluate(self, batch: Batch, metrics: MetricCollection, own: int | None = None) -> None:
        images, labels = batch
        logits = self(images)
        with self._loss_named():
            losses = row_losses(self.loss, logits, labels)
        if own != 0:
            metrics.update(preds=logits[:own], target=labels[:own], value=losses[:own])
        for name, metric in metrics.items(keep_base=False):
            self.log(name, metric, prog_bar=name.endswith("/accuracy"), batch_size=len(labels))

    def predict_step(self, batch: Batch | Tensor, batch_idx: int) -> dict[str, Tensor]:
        """``label`` ``(b,)`` and ``probability`` ``(b, c)`` of a batch of images, with or without labels."""
        images = batch if isinstance(batch, Tensor) else batch[0]
        probability = self(images).softmax(dim=1)
        return {"label": probability.argmax(dim=1), "probability": probability}

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    @property
    def between_steps(self) -> bool:
        """Whether no batch waits, with its gradient, for others of the same step."""
        return self._gradient.empty

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the names of the classes, the strategy's state (draw counter, seed, meters) and the settings."""
        names = class_names_of(self._trainer)
        if names is not None:
            checkpoint["class_names"] = names
        if self.strategy is not None:
            own = self.strategy.meter.state_dict()
            checkpoint["forward_gradient"] = {
                "strategy": self.strategy.state_dict(),
                "meters": gather_plain(self.strategy.communicator, own, device=self.device),
                "skipped": self._skipped,
                "gathered": self._gradient.state_dict(self.strategy, self.network.trainable()),
                "settings": self._settings(),
            }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore it when a run is resumed, and see to it that the settings given beside the checkpoint rule.

        Raises:
            SettingError: the checkpoint is of another network, or trained other parameters than this configuration, or
                was made with settings that a run cannot change (see :mod:`checkpoint_checks`).
        """
        check_weights(self, checkpoint["state_dict"])
        check_classes(checkpoint.get("class_names"), class_names_of(self._trainer))
        state = checkpoint.get("forward_gradient")
        # Only a run that goes on goes on counting: testing or fine-tuning from the file starts afresh.
        resumed = self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING
        if state is not None and self.strategy is not None and resumed:
            obey_settings(
                checkpoint, state, self._settings(), backbone=self.backbone, optimizer=self.optimizer_settings,
                callbacks=self.trainer.callbacks,  # type: ignore[attr-defined]
            )  # fmt: skip
            self.strategy.load_state_dict(state["strategy"])
            share_meters(self.strategy.meter, state.get("meters", [state["strategy"]["meter"]]), present_communicator())
            self._skipped = state["skipped"]
            self._gathered = state.get("gathered", {})
            self._resumed = True
            settle_progress(checkpoint)

    def on_train_start(self) -> None:
        """Go on with the gradient that waited for its step in a checkpoint, and with the rate of the present schedule.

        The checkpoint has put back the rate that it had.
        """
        self._gradient.load_state_dict(self._gathered, self._strategy(), self.network.trainable())
        self._gathered = {}
        schedule = self.lr_schedulers()
        if self._resumed and isinstance(schedule, LambdaLR):
            obey_schedule(schedule)
        write_page(self.trainer, self._settings(), self._strategy().budget)

    def _settings(self) -> dict[str, Any]:
        given = {**self.hparams, **self._start_weights, "freeze": self.network.frozen()}
        return describe_run(self.trainer, given, self._strategy())
