"""Estimates of the traces of a batch, from pilot queries, from a prediction that needs no query, or from both.

A trace estimated from a few pilots is noisy, a prediction from the clean pass less so, but biased. ``both`` shrinks
each pilot estimate towards the prediction, ``(nu pred + n Tr) / (nu + n)``: the posterior mean of a variance, with
``n`` the degrees of freedom of the pilot estimate (pilots, or antithetic pairs, less one) and ``nu`` the worth of the
prediction in the same unit.
"""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from flops_lightning.allocators.base import check_unused
from flops_lightning.allocators.gamma_regression import fit_gamma, prior_strength
from flops_lightning.errors import SettingError, check_at_least, check_choice, check_positive
from flops_lightning.protocol import SampleStatistics, TraceObservation
from flops_lightning.settings import read_settings

Source = Literal["prediction", "pilots", "both"]

# Before anything is learned, traces are proportional to the first of these predictors that there is.
STEEP = ("top_gradient", "head_gradient", "output_gradient")
LEAST_LOSS = 1e-6  # smaller ones, and that of a right answer under a 0-1 loss, count as this
START_PRIOR = 4.0  # nu until there are residuals of the prediction to learn it from


@dataclass
class TraceSettings:
    """Where an allocator gets the traces from.

    Attributes:
        source: ``prediction``: a regression on quantities of the clean pass, fitted to the queries of earlier steps;
            needs no pilots. ``pilots``: the pilot estimates; sites without pilots use those of the other sites.
            ``both``: pilot estimates shrunk towards the prediction.
        predictors: Features of the regression besides the loss, each by its logarithm; ``activation`` selects all names
            that begin with ``activation.``. Empty: all that the module returns. ``["loss"]``: only the loss.
        window: Number of past batches that the regression is fitted to. 0: no regression; traces are proportional to
            the first of ``top_gradient``, ``head_gradient`` and ``output_gradient`` that the module returns.
        ridge: Strength of the regression's prior, relative to its observations.
        prior_strength: ``nu``, the weight of the prediction relative to pilots, in degrees of freedom; 0: estimated
            from the residuals of the regression.

    Example:
        >>> TraceSettings(source="both", predictors=["output_gradient", "loss"]).window
        10
    """

    source: Source = "prediction"
    predictors: list[str] = field(default_factory=list)
    window: int = 10
    ridge: float = 0.001
    prior_strength: float = 0.0

    def check(self) -> None:
        """Raise a :class:`SettingError` if a value is out of range or has no effect."""
        check_choice("traces.source", self.source, get_args(Source))
        check_at_least("traces.window", self.window, 0, "Write, for example, 10, or 0 for none.")
        check_positive("traces.ridge", self.ridge, "Write, for example, 0.001.")
        check_at_least("traces.prior_strength", self.prior_strength, 0)
        if isinstance(self.predictors, str):
            raise SettingError("traces.predictors", self.predictors, "must be a list.", f"Write [{self.predictors}].")
        if not self.window and self.source != "pilots":
            if self.predictors and not set(self.predictors) & set(STEEP):
                problem = "predict nothing with window: 0, which uses gradients only."
                remedy = f"Add one of {', '.join(STEEP)}, or write a larger window."
                raise SettingError("traces.predictors", self.predictors, problem, remedy)
            check_unused("traces.ridge", self.ridge, TraceSettings.ridge, "window: 0")
        if self.source == "pilots":
            for name in ("predictors", "window", "ridge"):
                check_unused(f"traces.{name}", getattr(self, name), getattr(TraceSettings(), name), "source: pilots")
        if self.source != "both":
            check_unused("traces.prior_strength", self.prior_strength, 0, f"source: {self.source}")


@dataclass(frozen=True)
class TraceEstimate:
    """Traces of a batch, estimated before its queries are spent."""

    trace: Tensor  # (s, b) finite nonnegative estimates; 0 if a sample is not usable
    prediction: Tensor | None  # (s, b) estimates without the pilots
    usable: Tensor  # (b,) whether a sample's statistics are finite
    pilots: Tensor  # (s, b) pilots taken
    prior_strength: Tensor  # (s,) nu of each site
    pilots_reused: bool  # whether the pilots enter the gradient
    calibrated: bool  # whether traces of different sites are on the same scale; not before a prediction has learned

    def pilot_weight(self, counts: Callable[[Tensor], Tensor]) -> Tensor | None:
        """``(s, b)`` weight of each sample's reused pilots, ``n / (n + A)``, with A the counts for the prediction.

        None without a prediction or without reused pilots: then the weight is the share of the pilots in the budget.
        """
        if self.prediction is None or not self.pilots_reused or not bool((self.pilots > 0).any()):
            return None
        return self.pilots / (self.pilots + counts(self.prediction))


class TraceEstimator:
    """Estimates the traces of each batch before its queries are spent, and fits the regression to their results."""

    def __init__(self, settings: TraceSettings | Mapping[str, Any] | None = None) -> None:
        self.settings = read_settings(TraceSettings, TraceSettings() if settings is None else settings, "traces")
        self.settings.check()
        # Of each of the last batches: features (s, n, f), traces (s, n), degrees of freedom (s, n).
        self._history: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=self.settings.window)
        self._features: Tensor | None = None  # of the last batch; NaN where the clean pass is not finite
        self._names: tuple[str, ...] = ()
        self._predicts = self.settings.source != "pilots"

    @property
    def learns(self) -> bool:
        """Whether a regression is learned."""
        return self._predicts and self.settings.window > 0

    @property
    def requests(self) -> frozenset[str]:
        """Names of the statistics that are read."""
        names = {"trace", "trace_queries"} if self.settings.source != "prediction" else set()
        if self._predicts:
            wanted = self.settings.predictors
            names |= {f"predictors.{name}" for name in wanted if name != "loss"} if wanted else {"predictors"}
        return frozenset(names)

    def estimate(self, statistics: SampleStatistics, *, sites: int, unit: int = 1) -> TraceEstimate:
        """Estimate the traces of a batch from its statistics, in float64 on the CPU."""
        usable = statistics.loss.isfinite()
        pilot, queries = self._pilots(statistics, sites)
        prediction, strength = None, torch.full((sites,), self.settings.prior_strength or START_PRIOR).double()
        if self._predicts:
            features = self._read_features(statistics, sites)
            usable &= features.isfinite().all(dim=2).all(dim=0)
            self._features = torch.where(usable[:, None], features, torch.nan)
            prediction, learned = self._predict(torch.where(usable[:, None], features, 0.0))
            strength = strength if self.settings.prior_strength or learned is None else learned
        if prediction is None:
            trace = torch.where(pilot.isfinite(), pilot, mean_over_sites(pilot) * _level(pilot))
            usable &= trace.isfinite().all(dim=0)
        elif self.settings.source == "prediction":
            trace = prediction
        else:
            nu, n = strength[:, None], torch.where(pilot.isfinite(), queries / unit - 1.0, 0.0).clamp_min(0.0)
            # Before the first fit the prediction is known only up to a factor for each site.
            scaled = prediction if self._history else _match_mean(prediction, pilot)
            trace = (nu * scaled + n * torch.where(n > 0, pilot, 0.0)) / (nu + n)
        trace = torch.where(usable, trace.nan_to_num(0.0).clamp_min(0.0), 0.0)
        prediction = None if prediction is None else torch.where(usable, prediction, 0.0)
        calibrated = prediction is None or bool(self._history)
        return TraceEstimate(trace, prediction, usable, queries, strength, statistics.pilots_reused, calibrated)

    def observe(self, observation: TraceObservation) -> None:
        """Add the traces that the queries of the last batch showed to the regression's data."""
        if not self.learns or self._features is None:
            return
        observation = observation.on_cpu()
        if observation.trace.shape != self._features.shape[:2]:
            return
        features, trace = self._features.float(), observation.trace.float()
        known = trace.isfinite() & features.isfinite().all(dim=2)
        freedom = torch.where(known, observation.freedom, 0.0).float()
        if bool((freedom > 0).any()):
            features, trace = torch.where(known[..., None], features, 0.0), torch.where(known, trace, 0.0)
            self._history.append((features, trace, freedom))

    def _predict(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        steepest = next((name for name in STEEP if name in self._names), None)
        prior = torch.tensor([float(name == steepest) for name in self._names], dtype=torch.float64)
        if self._history:
            seen, traces, freedom = (torch.cat(parts, dim=1) for parts in zip(*self._history, strict=True))
        else:
            seen, traces, freedom = features, torch.zeros(features.shape[:2]), torch.ones(features.shape[:2])
        fit = fit_gamma(seen, traces, freedom, prior=prior, ridge=self.settings.ridge)
        strength = prior_strength(fit, seen, traces, freedom, unseen=START_PRIOR) if self._history else None
        return fit.predict(features), strength

    def _read_features(self, statistics: SampleStatistics, sites: int) -> Tensor:
        """``(s, b, f)`` features: logarithms of the loss and of the predictors.

        Unlike ``tanh(loss)``, which the paper's Gaussian reads, the logarithm tells losses of 4 apart, as language
        models have them, and those near 0, where the trace falls with the square of the loss.
        """
        offered = dict(statistics.predictors or {})
        wanted = [name for name in self.settings.predictors if name != "loss"]
        meant = {name: [each for each in offered if f"{each}.".startswith(f"{name}.")] for name in wanted}
        for name in (name for name in wanted if not meant[name]):
            problem = f"is not among the predictors that `sample_statistics` returned: {sorted(offered)}."
            raise SettingError("traces.predictors", name, problem, f"Choose from {[*STEEP, 'activation', 'loss']}.")
        chosen = dict.fromkeys(each for name in wanted for each in meant[name])
        names = ("log(loss)", *(chosen if self.settings.predictors else sorted(offered)))
        if names != self._names or any(len(features) != sites for features, _, _ in self._history):
            self._history.clear()
        self._names = names
        for name in names[1:]:
            _check_rows(f"predictors.{name}", offered[name], sites)
        columns = [statistics.loss.abs().clamp_min(LEAST_LOSS).log(), *(_log(offered[name]) for name in names[1:])]
        return torch.stack([column.expand(sites, len(statistics.loss)) for column in columns], dim=2)

    def _pilots(self, statistics: SampleStatistics, sites: int) -> tuple[Tensor, Tensor]:
        """``(s, b)`` pilot traces (NaN where there are none) and the number of pilots behind each."""
        if self.settings.source == "prediction":
            unknown = torch.full((sites, len(statistics.loss)), torch.nan, dtype=torch.float64)
            return unknown, torch.zeros_like(unknown)
        if statistics.trace is None:
            problem = "needs the statistic `trace`, and `sample_statistics` returned none."
            remedy = "Set `strategy.pilots`, or source: prediction."
            raise SettingError("traces.source", self.settings.source, problem, remedy)
        _check_rows("trace", statistics.trace, sites)
        trace, queries = statistics.trace.expand(sites, -1), statistics.trace_queries
        if queries is None and self.settings.source == "both":
            problem = "is needed to weigh pilots against the prediction."
            remedy = "Return how many pilots are behind each trace."
            raise SettingError("sample_statistics.trace_queries", None, problem, remedy)
        if queries is None:
            return trace, torch.where(trace.isfinite(), 1.0, 0.0)
        _check_rows("trace_queries", queries, sites)
        return trace, queries.expand(sites, -1)

    def state_dict(self) -> dict[str, Any]:
        """The batches in the window and the names of their features."""
        return {"seen": [list(batch) for batch in self._history], "names": list(self._names)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._history.clear()
        self._history.extend((features, traces, freedom) for features, traces, freedom in state["seen"])
        self._names, self._features = tuple(state["names"]), None


def mean_over_sites(trace: Tensor) -> Tensor:
    """``(b,)`` mean over the sites of ``(s, b)`` traces, each in units of its site's mean; NaN where none is known."""
    known, level = trace.isfinite(), _level(trace)
    mean = torch.where(known & (level > 0), trace.clamp_min(0.0) / level, torch.nan).nanmean(dim=0)
    return torch.where(mean.isnan() & known.any(dim=0), 0.0, mean)  # all known traces are zero


def _level(trace: Tensor) -> Tensor:
    """``(s, 1)`` mean of a site's known traces; 1 for a site without any."""
    mean = torch.where(trace.isfinite(), trace.clamp_min(0.0), torch.nan).nanmean(dim=1, keepdim=True)
    return torch.where(mean.isnan(), 1.0, mean)


def _match_mean(prediction: Tensor, pilot: Tensor) -> Tensor:
    """Rescale the prediction to the pilots' mean at each site that has any."""
    of_pilots, own = _level(pilot), _level(torch.where(pilot.isfinite(), prediction, torch.nan))
    return torch.where((of_pilots > 0) & (own > 0), prediction * of_pilots / own, prediction)


def _check_rows(name: str, value: Tensor, sites: int) -> None:
    if value.ndim == 2 and len(value) != sites:
        problem, remedy = f"must have one row for each of {sites} sites.", "Return (s, b), or (b,) for all sites alike."
        raise SettingError(f"sample_statistics.{name}", tuple(value.shape), problem, remedy)


def _log(value: Tensor) -> Tensor:
    """Take logarithms; a gradient that underflowed to zero counts as the smallest of its batch."""
    least = torch.where(value > 0, value, torch.inf).amin(dim=-1, keepdim=True)
    return torch.where(value == 0, torch.where(least.isinf(), 1.0, least), value).log()
