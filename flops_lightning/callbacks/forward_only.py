"""Trains an unchanged LightningModule from forward passes: its ``training_step`` runs again under moved parameters."""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from flops_lightning.callbacks.pass_state import PassState, copied
from flops_lightning.callbacks.silence import silence, silent_loggers
from flops_lightning.callbacks.step_network import Step, StepNetwork, first_column
from flops_lightning.distributed import present_communicator, reduce_gradients
from flops_lightning.errors import SettingError, check_at_least
from flops_lightning.strategies.base import ForwardGradientStrategy
from flops_lightning.strategies.mezo import MeZO
from flops_lightning.strategies.parameter_perturbation import SPSA, EvolutionStrategies
from flops_lightning.tasks.spending import count_skipped
from flops_lightning.tasks.trainer_setup import check_trainer, remove_reducer_and_scaler

REPLACED = ("training_step", "backward")


class ForwardOnly(pl.Callback):
    """Replaces the backward pass of any module with automatic optimisation by an estimate from forward passes.

    Lightning runs ``training_step`` without autograd and then calls ``backward``. Instead, the strategy calls
    ``training_step`` again with perturbed parameters. These queries start from the same state as the step (batch,
    random numbers, buffers and attributes), log nothing and leave the module unchanged. Clipping, accumulation,
    schedules, checkpoints, averaged weights and several processes work as usual.

    Only the gradients of the optimiser's parameters are estimated. A step of ``MeZO(queries=n)`` takes ``n + 1`` passes
    over its batch, and one more if its queries are one-sided. It needs the memory of inference, of two copies of these
    parameters, and of buffers and batch. ``queries/passes`` counts the queries of all processes so far, each a pass
    over a batch.

    A step that differentiates on its own, as physics-informed losses do, must turn autograd on with
    ``torch.enable_grad()``. Changes to anything outside of the module (a file, a global variable) belong in a hook such
    as ``on_train_batch_end``: queries would repeat them.

    Example:
        >>> import torch
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from flops_lightning.callbacks import ForwardOnly
        >>> from flops_lightning.strategies import MeZO
        >>> module = BoringModel()
        >>> before = module.layer.weight.detach().clone()
        >>> quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        >>> trainer = Trainer(
        ...     callbacks=[ForwardOnly(MeZO(seed=0))], max_steps=2, limit_val_batches=0, accelerator="cpu",
        ...     enable_model_summary=False, **quiet,
        ... )
        >>> trainer.fit(module)
        >>> torch.equal(before, module.layer.weight)
        False
    """

    def __init__(self, strategy: ForwardGradientStrategy | None = None, *, max_skipped_steps: int = 10) -> None:
        """Check the settings.

        Args:
            strategy: One that perturbs all parameters at once for the whole batch: ``MeZO`` (None: ``MeZO()``), or
                ``SPSA`` or ``EvolutionStrategies`` with shared directions, which take one more clean pass.
            max_skipped_steps: Number of consecutive batches that may lose all their queries before the run stops.
        """
        if strategy is None:
            strategy = MeZO()
        if not _moves_all_at_once(strategy):
            raise SettingError(
                "ForwardOnly.strategy", type(strategy).__name__, "needs the loss of each sample, and a training_step "
                "returns that of the batch.",
                "Use MeZO, or SPSA or EvolutionStrategies with layout: shared, no pilots and normalize: none, or a "
                "ForwardModule.",
            )  # fmt: skip
        check_at_least("ForwardOnly.max_skipped_steps", max_skipped_steps, 0)
        self.strategy = strategy
        self.max_skipped_steps = max_skipped_steps
        self._skipped = 0
        self._network: StepNetwork | None = None
        self._bound: dict[str, int] = {}  # the parameters that the strategy knows
        self._moved: list[nn.Parameter] = []
        self._replaced: dict[str, Any] | None = None  # what the module had in their place; None while it has its own
        self._query: Callable[[], Any] | None = None
        self._before: PassState | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot work, and take the place of ``backward``, early enough for tuners."""
        if stage != "fit":
            return
        _check_module(pl_module)
        check_trainer(trainer, manual=False)
        remove_reducer_and_scaler(trainer)
        if self._network is None:
            self._network = StepNetwork(Step(pl_module, self._loss))
        elif self._network.module.module is not pl_module:
            known = type(self._network.module.module).__name__
            raise SettingError("ForwardOnly", known, "already serves another module.", "Make one for each module.")
        self._network.trainer = trainer
        self._replaced = {name: vars(pl_module)[name] for name in REPLACED if name in vars(pl_module)}
        step = pl_module.training_step

        @wraps(step)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            if not trainer.training:
                return step(*args, **kwargs)
            given = copied((args, kwargs))
            self._query = lambda: _call(step, copied(given))
            self._bind(trainer)
            self._before = PassState(pl_module, self._moved)
            try:
                with torch.no_grad():
                    return step(*args, **kwargs)
            except RuntimeError as error:
                if "does not require grad" not in str(error):
                    raise
                problem, remedy = (
                    "differentiates on its own, and autograd is off.",
                    "Write `with torch.enable_grad():`.",
                )
                raise SettingError("training_step", type(pl_module).__name__, problem, remedy) from error

        def backward(loss: Tensor, *_: Any, **__: Any) -> None:
            assert self._before is not None
            self._before.check(pl_module)
            after = PassState(pl_module, self._moved)
            try:
                with trainer.precision_plugin.train_step_context(), silent_loggers(trainer):
                    self._estimate(trainer, loss)
            finally:
                after.restore()

        vars(pl_module).update(training_step=training_step, backward=backward)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse what only the optimiser and the wrapped module show; bind the strategy."""
        registered = {id(p) for p in pl_module.parameters()}
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, torch.optim.LBFGS):
                raise SettingError(
                    "configure_optimizers", "LBFGS", "does a line search, but every evaluation here has its own noise.",
                    "Return SGD, Adam or another optimiser that evaluates once per step.",
                )  # fmt: skip
            known = [id(p) in registered for group in optimizer.param_groups for p in group["params"]]
            if any(known) and not all(known):
                problem = "are not parameters of the module, so queries cannot perturb them."
                remedy = "Register their modules as attributes of the LightningModule, or leave them out."
                number = f"{known.count(False)} tensors"
                raise SettingError("configure_optimizers", number, problem, remedy)
        if isinstance(trainer.strategy.model, DistributedDataParallel):
            name = type(trainer.strategy).__name__
            problem = "waits in DistributedDataParallel for a backward pass."
            raise SettingError("trainer.strategy", name, problem, "Write strategy: auto or ddp.")
        self._bind(trainer)

    def _bind(self, trainer: pl.Trainer) -> None:
        """Give the strategy the parameters that are trained now: callbacks freeze and unfreeze them."""
        network = self._network
        assert network is not None
        trainable = network.trainable()
        present = {name: id(p) for name, p in trainable.items()}
        if not present:
            optimizers = [type(each).__name__ for each in trainer.optimizers]
            problem = "has no parameter of the module that requires a gradient: there is nothing to train."
            remedy = "Return an optimiser over such parameters; requires_grad_(True) unfreezes them."
            raise SettingError("configure_optimizers", optimizers, problem, remedy)
        self._moved = list(trainable.values())
        if present != self._bound:
            self.strategy.bind(network, first_column)
            self.strategy.join(present_communicator())
            self._bound = present

    @torch.no_grad()
    def _estimate(self, trainer: pl.Trainer, loss: Tensor) -> None:
        parameters = self._moved
        waiting = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        row = torch.zeros(1, 1, device=loss.device)
        self.strategy.estimate(self.strategy.clean_pass(row, row))
        if self.strategy.exchange == "gradients":
            reduce_gradients(self.strategy.communicator, parameters, weight=1.0)  # ranks count alike, as in DDP
        self._skipped = count_skipped(
            self._skipped, stepped=any(p.grad is not None for p in parameters), most=self.max_skipped_steps,
            unit="batches", remedy="Lower the learning rate or the strategy's sigma, or clip gradients.",
        )  # fmt: skip
        for p, before in zip(parameters, waiting, strict=True):
            if p.grad is not None:
                p.grad /= trainer.accumulate_grad_batches
            if before is not None:
                p.grad = before if p.grad is None else p.grad.add_(before)

    def _loss(self) -> Tensor:
        assert self._query is not None
        assert self._before is not None
        assert self._network is not None
        self._before.restore()
        silence(self._network.module.module)
        output = self._query()
        loss = output["loss"] if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise SettingError(
                "training_step", found, "must return one number, the loss of the batch, for perturbed parameters too.",
                "Return the mean of the losses, or a mapping with it under 'loss'.",
            )  # fmt: skip
        return loss.detach()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the queries so far; as DDP does, give every process the buffers of the first."""
        self._query = self._before = None
        ranks = self.strategy.communicator.size
        if ranks > 1:
            for buffer in pl_module.buffers():
                dist.broadcast(buffer.detach(), src=0)
        if not trainer.barebones:
            pl_module.log("queries/passes", float(self.strategy.meter.total().queries * ranks), batch_size=1)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the module as it was."""
        if self._replaced is not None:
            for name in REPLACED:
                vars(pl_module).pop(name, None)
            vars(pl_module).update(self._replaced)
        self._replaced = self._query = self._before = None

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the module as it was."""
        self.teardown(trainer, pl_module, "fit")

    def state_dict(self) -> dict[str, Any]:
        """The strategy's state, so that a resumed run draws the same noise."""
        return {"strategy": self.strategy.state_dict(), "skipped": self._skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.strategy.load_state_dict(state_dict["strategy"])
        self._skipped = state_dict["skipped"]


def _moves_all_at_once(strategy: ForwardGradientStrategy) -> bool:
    if isinstance(strategy, SPSA) and strategy.normalize != "none":
        return False  # the batch is a single row here, whose weights have no spread over samples
    if isinstance(strategy, (SPSA, EvolutionStrategies)):
        return strategy.layout == "shared" and not strategy.pilots.queries
    return isinstance(strategy, MeZO)


def _call(step: Callable[..., Any], given: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    args, kwargs = given
    return step(*args, **kwargs)


def _check_module(module: pl.LightningModule) -> None:
    name = type(module).__name__
    if not module.automatic_optimization:
        raise SettingError(
            "automatic_optimization", False, f"{name} calls backward itself, where ForwardOnly cannot replace it.",
            "Remove `self.automatic_optimization = False`, or use a ForwardModule.",
        )  # fmt: skip
    if is_overridden("backward", module):
        problem = "has its own backward, which ForwardOnly would never call."
        raise SettingError("model", name, problem, "Remove the method.")
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        problem = "takes its batches from dataloader_iter, so a query would use another batch."
        raise SettingError("training_step", name, problem, "Write training_step(self, batch, batch_idx).")
    for each, parameter in module.named_parameters():
        if isinstance(parameter, nn.UninitializedParameter):
            problem = "is a lazy parameter without a shape."
            raise SettingError("model", each, problem, "Run one forward pass before the module is trained.")
