"""How many queries a step should spend: the budget with the largest guaranteed decrease for its cost.

With the best step size a step decreases the loss by at least ``|g|^4 / (2 L E|g_hat|^2)`` (FLOPS, Ren et al., ICLR
2025, eq. 8, for a gradient ``g`` that is L-Lipschitz), where

    E|g_hat|^2 = |g|^2 + V / B + T / (B A)

for ``B`` samples with ``A`` queries each: ``V`` is the trace of the covariance of the samples' gradients, ``T`` the
mean trace of one query's (theorem 1). The step costs ``B (c_0 + c A)``: ``c_0`` without any query (clean pass and local
derivatives), ``c`` for a query. The decrease for the cost is largest at

    A* = sqrt(T c_0 / (c S)),    S = V + B |g|^2

which is Cochran's two-stage sampling ("Sampling Techniques", 1977, section 10.6) with the signal in it. With several
sites ``A*_s = sqrt(T_s c_0 / (c_s S))``: only ``T_s`` and ``c_s`` are a site's own. At the optimum the noise of the
queries is to the squared norm of the batch's exact gradient as the cost of the queries is to ``c_0``.

The bound takes the curvature of the loss to be ``L`` in all directions. A quadratic model with the Hessian ``H`` has
``E[g_hat^T H g_hat]`` in place of ``L E|g_hat|^2``: if noise meets ``k`` times the curvature that the gradient meets,
``T`` becomes ``k T``, and ``k`` is the setting ``noise_curvature``.

``S / B`` is the expected squared norm of the exact gradient ``G`` of a batch. Both it and the noise are estimated
without bias from the gradient ``G_hat`` of a step: the derivative of the mean clean loss along it has the expectation
``|G|^2``, since the noise of the queries is independent of it, and what ``|G_hat|^2`` has more is noise,
``N = T / (B A)``. Thus ``T / S = N A / |G|^2``, under the allocation in use: a better one needs fewer queries. The
noise is split over the sites in proportion to the squared norms of their estimates.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from flops_lightning.errors import SettingError, check_at_least, check_choice, check_positive
from flops_lightning.protocol import GradientObservation, Metric, QueryBudget, SampleStatistics
from flops_lightning.settings import read_settings

Rule = Literal["fixed", "improvement"]
Price = Literal["compute", "queries", "given"]

DENSE = 6
"""The gradient is measured in each of the first steps; after ``t`` steps the next is ``t / DENSE`` steps later."""


@dataclass
class BudgetSettings:
    """How many queries per sample a step spends on average.

    Attributes:
        rule: ``fixed``: the module's own budget. ``improvement``: at each site the number with the largest guaranteed
            decrease of the loss for its cost (``allocators/budget.py``), and the module's own until a gradient has
            been measured.
        price: How the cost of a step is measured. ``compute``: counted forward-equivalents. ``queries``: a query costs
            as much as a clean pass, whatever the site, and local derivatives cost nothing (a paid API). ``given``: by
            ``given_costs``.
        given_costs: Cost of a query at each site, from bottom to top. Only with ``given``.
        given_fixed: Cost of a sample apart from its queries, in the same unit. Only with ``given``.
        least: Smallest average at a site. Below 1 only some samples get a query.
        most: Largest average at a site.
        every: Largest number of steps between two measurements of the gradient; early in a run there are fewer. Each
            measurement costs two clean passes of a quarter of the batch.
        window: Measurements over which signal and noise are averaged, with decaying weights.
        metric: Units in which the parameters' gradients are compared: unchanged (``parameters``), or
            ``preconditioned`` by the optimiser, each squared derivative divided by Adam's running mean square.
        noise_curvature: Curvature of the loss along the noise of the queries, divided by that along the gradient; the
            bound assumes 1. If it is smaller, fewer queries are best.

    Example:
        >>> BudgetSettings(rule="improvement", price="queries", least=0.5).check()
        >>> BudgetSettings(price="queries").check()
        Traceback (most recent call last):
        flops_lightning.errors.SettingError: budget.price = 'queries': has no effect with rule: fixed. Write rule: ...
    """

    rule: Rule = "fixed"
    price: Price = "compute"
    given_costs: list[float] = field(default_factory=list)
    given_fixed: float = 0.0
    least: float = 1.0
    most: float = 64.0
    every: int = 50
    window: int = 8
    metric: Metric = "parameters"
    noise_curvature: float = 1.0

    def check(self) -> None:
        """Raise a :class:`SettingError` for a value out of range or without effect."""
        check_choice("budget.rule", self.rule, get_args(Rule))
        for name, default in vars(BudgetSettings()).items():
            value = getattr(self, name)
            if self.rule == "fixed" and value != default:
                problem = "has no effect with rule: fixed."
                raise SettingError(f"budget.{name}", value, problem, "Write rule: improvement, or remove it.")
        check_choice("budget.price", self.price, get_args(Price))
        check_choice("budget.metric", self.metric, get_args(Metric))
        check_positive("budget.least", self.least, "Write, for example, 1.")
        if not self.most >= self.least:
            raise SettingError("budget.most", self.most, f"is below least = {self.least}.", "Write, for example, 64.")
        check_positive("budget.noise_curvature", self.noise_curvature, "Write 1, or what was measured.")
        for name in ("every", "window"):
            check_at_least(f"budget.{name}", getattr(self, name), 1)
        if (self.price == "given") != bool(self.given_costs) or (self.price == "given") != (self.given_fixed > 0):
            problem = f"does not go with price: {self.price}."
            remedy = "Write price: given together with given_costs, one number for each site, and given_fixed above 0."
            raise SettingError("budget.given_costs", self.given_costs, problem, remedy)
        for cost in self.given_costs:
            check_positive("budget.given_costs", cost, "Write, for example, 1 for each site.")


def best_averages(noise: Tensor, signal: float, costs: Tensor, fixed: float) -> Tensor:
    """``(s,)`` ``A*_s = sqrt(T_s c_0 / (c_s S))``; infinite without a signal.

    Args:
        noise: ``(s,)`` ``T_s``, nonnegative: noise of one query a sample at each site.
        signal: ``S``, in the same unit.
        costs: ``(s,)`` ``c_s`` of a query, positive.
        fixed: ``c_0``, in the same unit.
    """
    return (noise.double() * fixed / (costs.double() * max(signal, 0.0))).sqrt()


class BudgetRule:
    """Chooses the budget of each step from the gradients of those before; ranks choose alike without exchange.

    Example:
        >>> rule = BudgetRule(BudgetSettings(rule="improvement", price="queries"))
        >>> own, statistics = QueryBudget((20,)), SampleStatistics(loss=torch.ones(4))
        >>> rule.choose(own, statistics).queries_per_sample  # nothing is known yet
        (20,)
        >>> rule.observe(GradientObservation(along=1.0, sq_norms=torch.tensor([1.25])), torch.tensor([20.0]))
        >>> rule.choose(own, statistics).queries_per_sample  # T / S = (1.25 - 1) * 20, c_0 = c_1 = 1
        (2.236...,)
    """

    def __init__(self, settings: BudgetSettings | Mapping[str, Any] | None = None) -> None:
        self.settings = read_settings(BudgetSettings, settings, "budget")
        self._steps = self._next = 0
        # Running means of signal and noise, both over the mean square of one query's estimate.
        self._weight, self._signal, self._noise = 0.0, 0.0, torch.zeros(0)

    @property
    def requests(self) -> frozenset[str]:
        """Names of the statistics that are read."""
        return frozenset({"counted_costs", "fixed_costs"} if self.settings.price == "compute" else ())

    def due(self) -> bool:
        """Whether the gradient of the coming step is to be measured; to be asked once a step."""
        step, self._steps = self._steps, self._steps + 1
        if step < self._next:
            return False
        self._next = step + max(1, min(self.settings.every, step // DENSE))
        return True

    def choose(self, own: QueryBudget, statistics: SampleStatistics) -> QueryBudget:
        """The budget of a batch; ``own`` is the module's."""
        if not self._weight or len(self._noise) != len(own.queries_per_sample):
            return own
        costs, fixed = self._costs(statistics, len(own.queries_per_sample))
        noise = self.settings.noise_curvature * self._noise
        best = best_averages(noise, self._signal, costs, fixed).nan_to_num(nan=math.inf)
        averages: list[float] = best.clamp(self.settings.least, self.settings.most).tolist()
        for i, shared in enumerate(own.shared_sites):
            if shared:  # all samples have the same number
                averages[i] = max(own.unit, own.multiple * round(averages[i] / own.multiple))
        return replace(own, queries_per_sample=tuple(averages))

    def observe(self, observation: GradientObservation, averages: Tensor) -> None:
        """Learn from the gradient of a step with these ``(s,)`` average queries of a sample."""
        squares, averages = observation.sq_norms.double().cpu(), averages.double()
        total = float(squares.sum())
        unit = float((averages * squares).sum())
        if not (math.isfinite(observation.along) and math.isfinite(unit) and unit > 0):
            return
        noise = total + observation.exact_sq_norm - observation.along
        of_sites = (averages * squares / total * (noise / unit)).clamp_min(0.0)
        keep = 1.0 - 1.0 / self.settings.window if len(self._noise) == len(of_sites) else 0.0
        # The first measurements are averaged alike, later ones with decaying weights.
        self._weight = keep * self._weight + 1.0
        share = 1.0 / self._weight
        self._signal += share * (observation.along / unit - self._signal)
        before = self._noise if keep else torch.zeros_like(of_sites)
        self._noise = before + share * (of_sites - before)

    def figures(self, budget: QueryBudget) -> dict[str, float]:
        """Figures to log: the average over the sites, each site's, and ``T / S``."""
        averages = [float(n) for n in budget.queries_per_sample]
        named = dict(zip(budget.site_names, averages, strict=True))
        ratio = {"T_over_S": float(self._noise.sum()) / self._signal} if self._weight and self._signal > 0 else {}
        return {"A": sum(averages) / len(averages)} | named | ratio

    def _costs(self, statistics: SampleStatistics, sites: int) -> tuple[Tensor, float]:
        """``(s,)`` cost of a query at each site, and what a sample costs without any."""
        settings = self.settings
        if settings.price == "queries":
            return torch.ones(sites).double(), 1.0
        costs, fixed = torch.tensor(settings.given_costs).double(), settings.given_fixed
        if settings.price == "compute":
            if statistics.counted_costs is None or statistics.fixed_costs is None:
                problem = "needs `counted_costs` and `fixed_costs`, which `sample_statistics` did not return."
                raise SettingError("budget.price", "compute", problem, "Return them, or write price: queries or given.")
            costs, fixed = statistics.counted_costs.double().cpu(), float(statistics.fixed_costs.sum())
            costs = costs.mean(dim=1) if costs.ndim == 2 else costs
        if len(costs) != sites:
            remedy = "Write one number for each site, from bottom to top."
            raise SettingError("budget.given_costs", costs.tolist(), f"there are {sites} sites.", remedy)
        return costs.clamp_min(1e-4 * float(costs.max())), fixed

    def state_dict(self) -> dict[str, Any]:
        """Steps so far, and what was measured."""
        measured = {"weight": self._weight, "signal": self._signal, "noise": self._noise.tolist()}
        return {"steps": self._steps, "next": self._next, **measured}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._steps, self._next = int(state["steps"]), int(state["next"])
        self._weight, self._signal = float(state["weight"]), float(state["signal"])
        self._noise = torch.tensor(state["noise"], dtype=torch.float64)
