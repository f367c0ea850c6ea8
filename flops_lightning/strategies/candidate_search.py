"""``CandidateSearch``: CMA-ES over all trainable numbers, from losses of candidates, behind the same interface."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flops_lightning.distributed import mean_over_ranks
from flops_lightning.meter import CLEAN
from flops_lightning.network.functional import FunctionalStages
from flops_lightning.network.rows import as_rows, gather
from flops_lightning.network.staging import StagedNetwork
from flops_lightning.noise.keys import NoiseKey
from flops_lightning.queries import CleanPass, LossFunction, clean_pass, longest_loss, row_losses, rows_of
from flops_lightning.search import CMASearch, SearchSettings
from flops_lightning.settings import read_settings
from flops_lightning.strategies.base import ChunkedStrategy, Estimate, Exchange, add_gradients
from flops_lightning.strategies.costs import SiteCosts
from flops_lightning.strategies.whole_batch import WholeBatchStrategy
from flops_lightning.transfers import to_device


class CandidateSearch(WholeBatchStrategy, ChunkedStrategy):
    """CMA-ES of the few numbers of a network: a training step is a generation, a batch's mean loss a fitness.

    The gradient it reports is what is missing to the mean of the next generation: SGD with a rate of 1 goes there. It
    is no derivative, so other optimisers, schedules and clipping do not fit it. A generation of ``n`` candidates costs
    ``n`` queries of every sample, and at a stage with a context (the class texts of a prompt) ``n`` in all; the meter
    names them by the stages.

    Example:
        >>> from flops_lightning import stage_network
        >>> network = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False))
        >>> search = CandidateSearch(search={"population": 8, "sigma": 0.5, "seed": 1})
        >>> search.bind(stage_network(network), loss=lambda output, target: (output - target)[:, 0] ** 2)
        >>> optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
        >>> inputs, targets = torch.eye(2), torch.tensor([[3.0], [-1.0]])
        >>> for _ in range(40):
        ...     optimizer.zero_grad()
        ...     _ = search.estimate(search.clean_pass(inputs, targets))
        ...     optimizer.step()
        >>> network[0].weight.round(decimals=1).tolist()
        [[3.0, -1.0]]
    """

    why = "scores whole candidates"
    draws = "candidates"
    exchange: Exchange = "losses"  # every rank learns from the losses of all

    def __init__(self, *, search: SearchSettings | Mapping[str, Any] | None = None, chunk_rows: int = 256) -> None:
        """Keep the settings: those of CMA-ES, and the upper bound of the rows in one forward pass."""
        self.search_settings = read_settings(SearchSettings, search, "search")
        super().__init__(chunk_rows=chunk_rows, seed=self.search_settings.seed)
        self._search: CMASearch | None = None
        self._costs: SiteCosts | None = None

    def bind(self, network: StagedNetwork, loss: LossFunction) -> None:
        """See :meth:`ForwardGradientStrategy.bind`."""
        super().bind(network, loss)
        trained = [i for i in range(len(network)) if network.parameters_of(i, i)]
        self._owned = {i: network.parameters_of(i, i) for i in trained}
        self._first, self._stages = trained[0], FunctionalStages(network)

    @property
    def search(self) -> CMASearch:
        """The search; it begins where the parameters are when it is first asked for."""
        if self._search is None:
            start = torch.cat([p.detach().flatten() for p in self.network.trainable().values()])
            self._search = CMASearch(start.double().cpu().numpy(), self.search_settings)
        return self._search

    def clean_pass(self, inputs: Any, targets: Any) -> CleanPass:
        """Run the batch at the mean of the generation."""
        inputs = as_rows(inputs)
        self._chunks.settle(self.network, inputs, longest_loss(self.loss, targets))
        of_batch = (self.network, self.loss, inputs, targets)
        with rows_of(self.network, self.loss, NoiseKey(self.seed, self.draw, CLEAN, self.rank)):
            clean = clean_pass(*of_batch, keep={self._first} - {0}, draw=self.draw, rows=self.chunk_rows)
        clean.activations.setdefault(0, inputs)
        if self._costs is None:
            self._costs = self._loss_costs.count(self.network, (), inputs, self.loss, targets, self.communicator)
        self.draw += 1
        cost = clean.batch_size * self._costs.from_stage[0] + self._loss_cost(clean) + self._costs.contexts
        self.meter.add(CLEAN, clean_passes=clean.batch_size, forward_equivalents=cost)
        return clean

    def _estimate(self, clean: CleanPass) -> Estimate:
        candidates = to_device(self.search.ask(), clean.loss.device)
        key = NoiseKey(self.seed, clean.draw, "candidates", self.rank)
        with self.network.evaluating(), rows_of(self.network, self.loss, key):
            fitness = mean_over_ranks(self.communicator, self._fitness(clean, candidates), clean.batch_size).tolist()
        lost = sum(not abs(each) < float("inf") for each in fitness)
        learned = self.search.tell(fitness)
        self._count(clean, len(fitness), lost)
        if learned:
            parameters = self.network.trainable()
            mean = to_device(self.search.mean, clean.loss.device)
            there = self._by_name(mean)
            add_gradients(parameters, {name: p.detach() - there[name] for name, p in parameters.items()})
        spent = clean.batch_size * len(fitness)
        return Estimate(clean.loss, clean.output, spent, lost * clean.batch_size, lost_batch=not learned)

    def _fitness(self, clean: CleanPass, candidates: Tensor) -> Tensor:
        """``(m,)`` mean losses of the batch at ``(m, d)`` candidates."""
        values = self._by_name(candidates)
        contexts = {
            i: self._stages.context(i, {name: values[name] for name in owned})
            for i, owned in self._owned.items()
            if self.network.stages[i].context is not None
        }
        found = []
        for k in range(len(candidates)):
            own = {i: {name: values[name][k] for name in owned} for i, owned in self._owned.items()}
            parts = torch.arange(clean.batch_size).split(self.chunk_rows)
            found.append(torch.cat([self._losses(clean, part, own, contexts, k) for part in parts]).mean())
        return torch.stack(found)

    def _losses(
        self, clean: CleanPass, part: Tensor, own: Mapping[int, Mapping[str, Tensor]], contexts: Mapping[int, Tensor],
        candidate: int,
    ) -> Tensor:  # fmt: skip
        index = to_device(part.numpy(), clean.loss.device)
        h = clean.activations[self._first].index_select(0, index)
        for i, stage in enumerate(self.network.stages[self._first :], self._first):
            if i in contexts and stage.context is not None:
                h = stage.context.apply(h, contexts[i][candidate])
            else:
                h = self._stages.run(i, h, own.get(i, {}))
        return row_losses(self.loss, h, gather(clean.targets, index, part.numpy()))

    def _by_name(self, numbers: Tensor) -> dict[str, Tensor]:
        """Each parameter's part of ``(..., d)`` numbers, in its own shape and dtype."""
        parameters = self.network.trainable()
        parts = numbers.split([p.numel() for p in parameters.values()], dim=-1)
        named = zip(parameters.items(), parts, strict=True)
        return {name: part.unflatten(-1, p.shape).to(p.dtype) for (name, p), part in named}

    def _loss_cost(self, clean: CleanPass) -> float:
        return float(self._loss_costs.of(self.loss, clean.targets, clean.batch_size).sum())

    def _count(self, clean: CleanPass, candidates: int, lost: int) -> None:
        """Meter a generation: a context once for all samples, all else for each of them."""
        assert self._costs is not None
        samples = clean.batch_size
        by_row = [i for i in self._owned if self.network.stages[i].context is None]
        for i in self._owned:
            each = samples if i in by_row else 1
            cost = self._costs.contexts if i not in by_row else 0.0
            if i == self._first:  # what runs above it is the same in all
                cost += samples * self._costs.from_stage[i] + self._loss_cost(clean)
            self.meter.add(
                self.network.stages[i].name, queries=candidates * each, lost=lost * each,
                forward_equivalents=candidates * cost,
            )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Draw counter, meter, and the fitnesses of all generations."""
        return {**super().state_dict(), "search": self.search.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, by replay."""
        super().load_state_dict(state)
        self._search = CMASearch(state["search"]["start"], self.search_settings)
        self._search.load_state_dict(state["search"])
