"""What every task trained by a forward-gradient strategy shares: step, optimiser, logs and checkpoints."""

from abc import abstractmethod
from dataclasses import asdict
from typing import Any, ClassVar, cast

import lightning.pytorch as pl
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from flops_lightning.distributed import present_communicator
from flops_lightning.errors import SettingError, check_at_least
from flops_lightning.network.replay import result_of
from flops_lightning.network.staging import BatchNormSetting, StagedNetwork, stage_network
from flops_lightning.network.trace import call
from flops_lightning.optim import optimizers
from flops_lightning.optim.optimizers import ClipSettings, OptimizerSettings
from flops_lightning.phases import phase
from flops_lightning.resume.restore import restore_run, save_run, settings_of
from flops_lightning.settings import read_settings
from flops_lightning.strategies.base import Estimate, ForwardGradientStrategy
from flops_lightning.strategies.query_strategy import QueryStrategy
from flops_lightning.tasks import trainer_setup
from flops_lightning.tasks.allocated_module import AllocatedModule, Batch
from flops_lightning.tasks.mean_gradient import MeanGradient
from flops_lightning.tasks.spending import SpendSettings, count_skipped
from flops_lightning.tasks.step import QueryLog, StepState, measure_gradient, shows_bar
from flops_lightning.tensorboard import write_page
from flops_lightning.transfers import on_host

LISTED = 40
"""Most frozen parameters that the log names one by one."""


class ForwardModule(AllocatedModule):
    """A LightningModule trained by a :class:`~flops_lightning.strategies.ForwardGradientStrategy`.

    A subclass passes its network to :meth:`stage` and defines :meth:`loss`; batches are ``(inputs, targets)`` pairs.
    A ``QueryAllocatorCallback`` can allocate its queries; without one, every sample gets the same number.

    Attributes:
        samples: Number of training samples so far, counted once per epoch, since training began or was resumed.
        weights_name: File name for what :meth:`export_weights` writes.

    Example:
        >>> import torch
        >>> from flops_lightning.strategies import LikelihoodRatio
        >>> from flops_lightning.tasks import ForwardModule
        >>> class Regression(ForwardModule):
        ...     def __init__(self, **settings):
        ...         super().__init__(**settings)
        ...         self.net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        ...         self.stage(self.net)
        ...
        ...     def loss(self, outputs, targets):
        ...         return (outputs - targets).square().sum(dim=1)
        >>> task = Regression(strategy=LikelihoodRatio(seed=0), optimizer={"name": "sgd", "lr": 0.1})
        >>> task.sample_statistics((torch.zeros(5, 2), torch.zeros(5, 1))).loss.shape
        torch.Size([5])
    """

    automatic_optimization = False
    weights_name: ClassVar[str] = "model.safetensors"

    def __init__(
        self, *, strategy: ForwardGradientStrategy | None = None, optimizer: OptimizerSettings | None = None,
        clip: ClipSettings | None = None, max_skipped_steps: int = 10, spend: SpendSettings | None = None,
    ) -> None:  # fmt: skip
        """Check the settings.

        Args:
            strategy: The gradient estimator; not needed to validate, test and predict.
            optimizer: Optimiser and learning-rate schedule.
            clip: Gradient clipping.
            max_skipped_steps: Number of consecutive steps that may lose all their queries before the run stops.
            spend: Queries or compute at which the run ends.
        """
        super().__init__()
        check_at_least("max_skipped_steps", max_skipped_steps, 0)
        self.strategy = strategy
        self.optimizer_settings = read_settings(OptimizerSettings, optimizer, "optimizer")
        self.clip_settings = read_settings(ClipSettings, clip, "clip")
        self.spend_settings = read_settings(SpendSettings, spend, "spend")
        self.max_skipped_steps = max_skipped_steps
        # Plain values only, so that checkpoints load with weights_only=True.
        grouped = {
            "optimizer": asdict(self.optimizer_settings), "clip": asdict(self.clip_settings),
            "spend": asdict(self.spend_settings),
        }  # fmt: skip
        self.save_hyperparameters({**grouped, "max_skipped_steps": max_skipped_steps})
        self.start_weights: dict[str, Any] = {}  # settings that only chose where the weights started
        self.start_anew()

    def start_anew(self) -> None:
        """Forget an accumulated gradient, the step at hand, and what an allocator asked for."""
        self._gradient = MeanGradient(self.optimizer_settings.accumulate_grad_batches)
        self._state, self._query_log, self._skipped = StepState(), QueryLog(), 0
        self._requested: frozenset[str] = frozenset()
        self._spent = 0.0  # share of what the run may spend
        self.samples = 0

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Any) -> Tensor:
        """``(r,)`` losses of ``(r, ...)`` outputs, one a row; a derivative is needed by ``Backprop`` only."""

    def stage(
        self, network: nn.Module | StagedNetwork, example: Any = None, *, batch_norm: BatchNormSetting = "refuse"
    ) -> None:
        """Cut the network into stages and bind the strategy to them; refuse what does not fit.

        Of a network that is cut already (``stage_clip``), keep the ``module`` as an attribute too, so that Lightning
        moves and saves it.

        ``example``: inputs of a few samples, from which the stages of most networks are found; None: Lightning's
        ``example_input_array``. ``batch_norm``: ``refuse`` or ``frozen``. See
        :func:`~flops_lightning.network.stage_network`.
        """
        self.network = stage_network(
            network, self.example_input_array if example is None else example, batch_norm=batch_norm
        )
        if self.strategy is not None:
            self.strategy.bind(self.network, self.loss)

    def forward(self, inputs: Any) -> Tensor:
        """The network's ``(b, ...)`` outputs."""
        self.check_inputs(inputs)
        return result_of(call(self.network.module, inputs))

    def configure_callbacks(self) -> list[pl.Callback]:
        """Add no callback: Lightning calls this first, early enough to refuse and adapt the trainer."""
        trainer_setup.check_trainer(self.trainer)
        if self.trainer.state.fn == TrainerFn.FITTING:
            trainer_setup.refuse_compiled(self)
            trainer_setup.remove_reducer_and_scaler(self.trainer)
        return []

    def configure_optimizers(self) -> Any:
        """The optimiser of the trainable parameters, and its schedule by step."""
        optimizer = optimizers.build_optimizer(self.network.module, self.optimizer_settings)
        steps = trainer_setup.optimizer_steps(self.trainer, self._gradient.batches)
        spent = (lambda: self._spent) if self.spend_settings.limited else None
        schedule = optimizers.build_schedule(optimizer, self.optimizer_settings, steps, spent)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "lr"}}

    def on_fit_start(self) -> None:
        """Join the ranks, check that the strategy owns what is trained, and list what is not."""
        strategy = self._training_strategy()
        self._check_ownership()
        trainer_setup.check_optimization(self.trainer, self._gradient.batches, len(strategy.update_groups))
        strategy.join(present_communicator())
        owned = {id(p) for site in (*strategy.sites, *strategy.exact_sites) for p in site.parameters.values()}
        if strategy.sites and owned != {id(p) for p in self.network.trainable().values()}:
            strategy.bind(self.network, self.loss)  # the network has changed since the task was made
        if strategy.sites and not getattr(strategy, "specs", True):
            names = [stage.name for stage in self.network.stages]
            layout = (f"{site.name} ({names[site.first]} to {names[site.last]})" for site in strategy.sites)
            rank_zero_info(f"model.strategy.sites: none are given; the default is {', '.join(layout)}.")
        if frozen := self.network.frozen():
            listed = (
                ", ".join(frozen) if len(frozen) <= LISTED else f"{len(frozen)} of them, {frozen[0]} to {frozen[-1]}"
            )
            rank_zero_info(f"frozen parameters: {listed}")

    def _check_ownership(self) -> None:
        own = {id(p) for p in self.parameters()}
        for name, parameter in self.network.trainable().items():
            if id(parameter) not in own:
                problem = "is trained but is not a parameter of the task, so no checkpoint would contain it."
                raise SettingError("network", name, problem, "Keep the network's module as an attribute of the task.")

    def on_train_start(self) -> None:
        """Continue with the gradient and the learning rate that a checkpoint stopped at; write TensorBoard's page."""
        strategy = self._training_strategy()
        self._gradient.restore(strategy, self.network.trainable())
        self._spent, self.samples = self.spend_settings.share(strategy), 0
        optimizers.set_scheduled_rates(cast("LambdaLR", self.lr_schedulers()))
        write_page(self.trainer, settings_of(self, self.trainer, strategy), strategy.budget)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Estimate the gradient from queries and step, once or (Algorithm 1) once for each site.

        Returns:
            The mean clean loss of the batch.
        """
        strategy, clean = self._training_strategy(), self._clean_pass(batch)
        self.samples += clean.batch_size
        counts, watched_in = self._state.counts, self._state.watched
        weights = {"pilot_weight": self._state.pilot_weights, "inclusion": self._state.inclusion}
        self._state = StepState()
        if counts is None:
            self._refuse_pilots("no allocator asks for pilots.", "Add QueryAllocatorCallback to trainer.callbacks.")
        # Only the last of several updates counts as a step of the trainer.
        counted, uncounted = cast("LightningOptimizer", self.optimizers()), self._optimizer()
        groups, watched = strategy.update_groups, "observation" in self._requested
        stepped = has_gradient = False
        for i, sites in enumerate(groups):
            if i:
                clean = strategy.refresh(clean, groups[i - 1])
            with self._gradient.adding(strategy, self.network.trainable().values(), samples=clean.batch_size):
                estimate = strategy.estimate(clean, counts, sites or None, **weights, traces=watched)
            self._state.observe(estimate.observation)
            if i == 0:
                loss = estimate.loss.mean()
                self.log_batch(estimate, clean.targets)
            self._query_log.batch(self, strategy.meter)
            if not self._gradient.complete(last=self.trainer.is_last_batch):
                return loss
            has_gradient = self._gradient.reduce(strategy, self.network.trainable(), sites)
            if has_gradient:
                if watched_in and isinstance(strategy, QueryStrategy):
                    metric = self._squared_steps() if watched_in == "preconditioned" else None
                    measured = measure_gradient(strategy, clean, self.network.trainable(), sites, metric)
                    self._state.observe_gradient(measured)
                norm = optimizers.clip_gradients(self.network.module.named_parameters(), self.clip_settings)
                self.log(f"grad_norm/{sites[0] if len(groups) > 1 else 'all'}", norm)
                with phase("optimiser"):
                    (counted if i == len(groups) - 1 else uncounted).step()
                stepped = True
        if stepped and not has_gradient:
            counted.zero_grad()
            counted.step()  # changes nothing without gradients; the trainer counts it
        self._query_log.step(self, strategy.meter)
        self._spent = self.spend_settings.share(strategy)
        self.trainer.should_stop |= self._spent >= 1
        self._skipped = count_skipped(
            self._skipped, stepped=stepped, most=self.max_skipped_steps, unit="steps",
            remedy="Lower optimizer.lr or the sites' sigma, or set clip.norm.",
        )  # fmt: skip
        if stepped:
            cast("LambdaLR", self.lr_schedulers()).step()
        return loss

    def log_batch(self, estimate: Estimate, targets: Any) -> None:
        """Log ``train/loss`` and ``train/lr`` of a batch; override to log more."""
        several = self.trainer.world_size > 1
        self.log("train/loss", estimate.loss.mean(), prog_bar=shows_bar(self), sync_dist=several)
        self.log_dict(on_host({"train/lr": max(group["lr"] for group in self._optimizer().param_groups)}))

    def on_train_epoch_end(self) -> None:
        """Log the queries of every site."""
        strategy = self._training_strategy()
        self._query_log.epoch(self, strategy.meter, [site.name for site in strategy.sites])

    @property
    def tells_right(self) -> bool:
        """Whether :meth:`right` knows which samples are answered right, so that a test can count them."""
        return False

    def right(self, batch: Batch) -> Tensor:
        """``(b,)`` which samples of a batch are answered right."""
        raise NotImplementedError

    def report(self) -> dict[str, Any]:
        """What this task adds to the summary of its run; every process must call this."""
        logged = self.trainer.callback_metrics.items()
        return {"validation": {name.removeprefix("val/"): float(x) for name, x in logged if name.startswith("val/")}}

    @rank_zero_only
    def export_weights(self, path: str) -> None:
        """Write what was trained: here its tensors by name, as safetensors. Of several processes the first writes."""
        from safetensors.torch import save_file

        save_file({name: p.detach().cpu().contiguous() for name, p in self.network.trainable().items()}, path)

    @property
    def between_steps(self) -> bool:
        """Whether no accumulated gradient waits for its step."""
        return self._gradient.empty

    def on_validation_model_zero_grad(self) -> None:
        """Free the gradients before a validation, as Lightning does, but keep those that wait for their step."""
        if self.between_steps:
            super().on_validation_model_zero_grad()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what a resumed run needs, see :func:`~flops_lightning.resume.restore.save_run`."""
        waiting = self._gradient.state_dict(self.strategy, self.network.trainable()) if self.strategy else {}
        save_run(checkpoint, self, self._trainer, {"skipped": self._skipped, "gathered": waiting})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore it where a run is resumed, see :func:`~flops_lightning.resume.restore.restore_run`."""
        own = restore_run(checkpoint, self, self._trainer)
        if own is not None:
            self._skipped, self._gradient.saved = own["skipped"], own.get("gathered", {})
