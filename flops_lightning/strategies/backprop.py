"""``Backprop``: the exact gradient, the upper bound of every forward-only estimate, behind the same interface."""

from dataclasses import replace
from typing import Any

import torch

from flops_lightning.errors import SettingError
from flops_lightning.meter import CLEAN
from flops_lightning.network.rows import as_rows, gather, value_of
from flops_lightning.network.staging import StagedNetwork
from flops_lightning.queries import CleanPass, LossFunction, at_least_float32, full_precision, row_losses
from flops_lightning.strategies.base import Estimate, add_gradients
from flops_lightning.strategies.costs import SiteCosts
from flops_lightning.strategies.whole_batch import WholeBatchStrategy
from flops_lightning.suffix_loss import SuffixLoss


class Backprop(WholeBatchStrategy):
    """Reverse-mode gradient of the mean loss, in eval mode like the queries (no dropout), so that objectives agree.

    Float16 autocast is refused: a backward pass in float16 needs a loss scaler, and nothing else here does.

    Example:
        >>> from flops_lightning import Backprop, stage_network
        >>> network = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False))
        >>> strategy = Backprop()
        >>> strategy.bind(stage_network(network), lambda output, target: (output - target)[:, 0])
        >>> strategy.estimate(strategy.clean_pass(torch.tensor([[3.0]]), torch.tensor([[0.0]]))).loss.shape
        torch.Size([1])
        >>> network[0].weight.grad
        tensor([[3.]])
    """

    why = "spends no queries"
    _costs: SiteCosts | None = None

    def bind(self, network: StagedNetwork, loss: LossFunction) -> None:
        """See :meth:`ForwardGradientStrategy.bind`; refuse a loss that says it has no derivative."""
        if isinstance(loss, SuffixLoss) and not loss.differentiable:
            raise without_derivative(loss, loss.obstacle)
        super().bind(network, loss)
        self._costs = None

    def clean_pass(self, inputs: Any, targets: Any) -> CleanPass:
        """Run the batch and keep its graph for ``estimate``."""
        inputs = as_rows(inputs)
        device = inputs.device.type
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
            raise SettingError(
                "trainer.precision", "16-mixed", "Backprop has no loss scaler: gradients would underflow in float16.",
                "Write precision: bf16-mixed or 32-true for Backprop.",
            )  # fmt: skip
        with self.network.evaluating(), torch.enable_grad():
            embedding = self.network.run(inputs, 0, len(self.network) - 1)
            output = at_least_float32(self.network.run(embedding, len(self.network) - 1))
            loss = row_losses(self.loss, output, targets)
        if not loss.requires_grad:
            raise without_derivative(self.loss)
        self.draw += 1
        if self._costs is None and isinstance(self.loss, SuffixLoss):
            self._costs = self._loss_costs.count(self.network, (), inputs, self.loss, targets, self.communicator)
        self.meter.add(CLEAN, clean_passes=len(loss), forward_equivalents=self._cost(len(loss), targets, 1, 1))
        return CleanPass(targets, {0: inputs}, output, loss, value_of(embedding).detach().flatten(1), self.draw - 1)

    @torch.enable_grad()
    def _estimate(self, clean: CleanPass) -> Estimate:
        parameters = self.network.trainable()
        finite = torch.isfinite(clean.loss.detach())
        detached = replace(clean, loss=clean.loss.detach(), output=clean.output.detach())
        # A backward pass costs two forward passes, one through what is frozen.
        self.meter.add(CLEAN, forward_equivalents=self._cost(clean.batch_size, clean.targets, 2, 1))
        if not bool(finite.any()):
            return Estimate(detached.loss, detached.output, 0, lost=0, silent_samples=len(finite), lost_batch=True)
        total = clean.loss.sum() / clean.batch_size
        if not bool(finite.all()):
            # A sample without a finite loss contributes nothing, as it would with queries; in its graph zero times NaN
            # would be NaN, so the others run again without it.
            with self.network.evaluating():
                index = finite.nonzero()[:, 0]
                output = self.network.run(clean.activations[0].index_select(0, index))
                total = row_losses(self.loss, output, gather(clean.targets, index)).sum() / clean.batch_size
        with full_precision(total):
            gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        zeros = {name: torch.zeros_like(p) for name, p in parameters.items()}
        add_gradients(parameters, {n: zeros[n] if g is None else g for n, g in zip(parameters, gradients, strict=True)})
        return Estimate(detached.loss, detached.output, 0, silent_samples=int((~finite).sum()))

    def _cost(self, samples: int, targets: Any, passes: int, loss_passes: int) -> float:
        """Cost of passes through the network and, where it is the rest of the network, of passes through the loss."""
        if self._costs is None:
            return passes * samples
        of_loss = self._loss_costs.of(self.loss, targets, samples)
        return passes * samples * self._costs.from_stage[0] + loss_passes * float(of_loss.sum())


def without_derivative(loss: LossFunction, problem: str = "") -> SettingError:
    """The error for a loss that a strategy needs to differentiate and cannot."""
    name = getattr(loss, "__name__", type(loss).__name__)
    remedy = "Use a strategy that needs none, such as LikelihoodRatio, or a loss such as cross-entropy."
    if isinstance(loss, SuffixLoss) and loss.remote:
        problem = f" here: {loss.part} runs elsewhere and answers with losses alone"
        remedy = "Train what is before it by a strategy that needs none: LikelihoodRatio, SPSA or MeZO."
    return SettingError("loss", name, f"has no derivative{problem}.", remedy)
