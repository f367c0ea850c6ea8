import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flops_lightning.allocators.gamma_regression import fit_gamma
from flops_lightning.allocators.trace_estimator import START_PRIOR, TraceEstimate, TraceEstimator, TraceSettings
from flops_lightning.errors import SettingError
from flops_lightning.protocol import SampleStatistics, TraceObservation
from tests.allocators.draws import traces

D = torch.float64
NAN = math.nan


def batch(seed: int = 0, *, size: int = 16, sites: int = 2, **more: Any) -> SampleStatistics:
    loss, steep, *per_site = traces(2 + sites, size, seed=seed)
    return SampleStatistics(loss, predictors={"top_gradient": steep, "activation": torch.stack(per_site)}, **more)


def seen(seed: int = 0, *, size: int = 16, sites: int = 2, queries: int = 6, unit: int = 1) -> TraceObservation:
    return TraceObservation(traces(sites, size, seed=1000 + seed), torch.full((sites, size), float(queries)), unit)


def learn(estimator: TraceEstimator, statistics: SampleStatistics, observation: TraceObservation) -> TraceEstimator:
    estimator.estimate(statistics, sites=2)
    estimator.observe(observation)
    return estimator


def trained(settings: TraceSettings | None = None) -> TraceEstimator:
    estimator = TraceEstimator(settings)
    for i in range(3):
        learn(estimator, batch(i, **PILOTS), seen(i))
    return estimator


def part(statistics: SampleStatistics, kept: slice) -> SampleStatistics:
    predictors = {name: value[..., kept] for name, value in (statistics.predictors or {}).items()}
    return SampleStatistics(loss=statistics.loss[kept], predictors=predictors)


PILOTS: dict[str, Any] = {"trace": torch.linspace(0.5, 2.0, 16, dtype=D), "trace_queries": torch.full((16,), 4.0)}


def assert_same(one: TraceEstimate, other: TraceEstimate) -> None:
    for name in ("trace", "prediction", "usable", "pilots", "prior_strength"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b), name


# Prediction


def test_prediction_is_the_gamma_regression_on_what_was_seen() -> None:
    def standing(statistics: SampleStatistics) -> Tensor:
        named = statistics.predictors or {}
        columns = [named["activation"].log(), named["top_gradient"].log().expand(2, -1)]
        return torch.stack([statistics.loss.log().expand(2, -1), *columns], dim=2)

    estimator = TraceEstimator()
    features, traces, freedom = [], [], []
    for i, size in enumerate((16, 5, 16, 1)):  # the last batch of an epoch may have one sample
        observation = seen(i, size=size, queries=3 + i, unit=2 if i == 2 else 1)
        learn(estimator, batch(i, size=size), observation)
        features.append(standing(batch(i, size=size)))
        traces.append(observation.trace)
        freedom.append(torch.full((2, size), [2.0, 3.0, 1.5, 5.0][i], dtype=D))  # queries (or pairs) less one
    prior = torch.tensor([0.0, 0.0, 1.0], dtype=D)
    parts = [torch.cat(each, dim=1) for each in (features, traces, freedom)]
    fit = fit_gamma(*parts, prior=prior, ridge=TraceSettings.ridge)
    estimate, expected = estimator.estimate(batch(7), sites=2), fit.predict(standing(batch(7)))
    torch.testing.assert_close(estimate.trace, expected, rtol=1e-5, atol=0.0)  # remembered in float32
    torch.testing.assert_close(estimate.trace, estimate.prediction, rtol=1e-12, atol=0.0)


def test_power_of_the_loss_is_learned_from_large_and_small_losses() -> None:
    estimator = TraceEstimator(TraceSettings(predictors=["loss"], ridge=1e-6))
    for low, high in ((3.0, 6.0), (1e-4, 1e-2)):  # of language models, and of a batch that is nearly learned
        loss = torch.linspace(low, high, 16, dtype=D)
        learn(
            estimator,
            SampleStatistics(loss),
            TraceObservation(loss.square()[None].expand(2, -1), torch.full((2, 16), 9)),
        )
        torch.testing.assert_close(
            estimator.estimate(SampleStatistics(loss), sites=2).trace, loss.square().expand(2, -1), rtol=0.01, atol=0.0
        )
    odd = estimator.estimate(SampleStatistics(torch.tensor([0.0, -2.0, 2.0])), sites=2)
    assert bool(odd.usable.all())
    zero, negative, positive = odd.trace[0].tolist()
    assert 0.0 < zero < negative == positive  # a 0-1 loss tells right from wrong


@pytest.mark.parametrize("names", ["head_gradient output_gradient top_gradient", "head_gradient output_gradient", ""])
def test_before_anything_is_learned_traces_follow_the_steepest_predictor(names: str) -> None:
    predictors = dict(zip(["activation", *names.split()], traces(4, 8), strict=False))
    statistics = SampleStatistics(loss=torch.linspace(0.0, 3.0, 8, dtype=D), predictors=predictors)
    expected = predictors.get("top_gradient", predictors.get("head_gradient", torch.ones(8, dtype=D)))
    unlearning = learn(TraceEstimator({"window": 0}), statistics, seen(size=8))
    for trace in (each.estimate(statistics, sites=2).trace for each in (TraceEstimator(), unlearning)):
        torch.testing.assert_close(trace / trace[:, :1], (expected / expected[0]).expand(2, -1), rtol=1e-9, atol=0.0)


def test_a_name_stands_for_all_that_begin_with_it_and_a_dot() -> None:
    estimators = [TraceEstimator({"predictors": names}) for names in (["activation"], ["activation.0", "activation.1"])]
    for i in (*range(3), 9):
        lines = (batch(i).predictors or {})["activation"]
        named = {"activation.0": lines[0], "activation.1": lines[1], "activations": lines[0].square()}
        pair = [e.estimate(replace(batch(i), predictors=named), sites=2) for e in estimators]
        for estimator in estimators:
            estimator.observe(seen(i))
    assert_same(*pair)


def test_window_forgets() -> None:
    long, short = TraceEstimator(TraceSettings(window=3)), TraceEstimator(TraceSettings(window=3))
    for i in range(8):
        learn(long, batch(i), replace(seen(i), trace=seen(i).trace * (1e6 if i < 5 else 1.0)))
        if i >= 5:
            learn(short, batch(i), seen(i))
    assert_same(long.estimate(batch(20), sites=2), short.estimate(batch(20), sites=2))


def test_observations_without_information_leave_no_mark() -> None:
    reference = trained().estimate(batch(9), sites=2)
    estimator = TraceEstimator()
    estimator.observe(seen(0))  # of a batch never estimated
    for i in range(3):
        estimator.estimate(batch(i), sites=2)
        estimator.observe(seen(0, size=15))
        estimator.observe(seen(0, sites=3))
        estimator.observe(seen(0, queries=0))
        estimator.observe(replace(seen(0), trace=torch.full((2, 16), NAN)))
        estimator.observe(seen(i))
    assert_same(estimator.estimate(batch(9), sites=2), reference)


def test_lost_estimates_count_as_unobserved() -> None:
    # Six samples lost their queries, at one site or both; the others count as if those had not been there.
    lost = seen(0)
    lost.trace[:, :4], lost.trace[1, :6], lost.queries[1, :6] = NAN, 0.0, 0.0
    estimator = learn(TraceEstimator(), batch(0), lost)
    for site, kept in ((0, slice(4, 16)), (1, slice(6, 16))):
        known = TraceObservation(lost.trace[:, kept].nan_to_num(1.0), lost.queries[:, kept].clamp_min(6.0))
        other = learn(TraceEstimator(), part(batch(0), kept), known)
        one, expected = (each.estimate(batch(9), sites=2).trace[site] for each in (estimator, other))
        torch.testing.assert_close(one, expected, rtol=1e-9, atol=0.0)


def test_site_that_was_never_seen_keeps_the_first_prior_strength() -> None:
    blind = seen(0)
    blind.queries[1] = 0.0
    seen_site, unseen_site = learn(TraceEstimator(), batch(0), blind).estimate(batch(9), sites=2).prior_strength
    assert float(unseen_site) == START_PRIOR != float(seen_site)


# Non-finite and zero statistics


@pytest.mark.parametrize(("where", "bad"), [("loss", NAN), ("top_gradient", math.inf), ("activation", -math.inf)])
def test_samples_that_are_not_finite_touch_no_other(where: str, bad: float) -> None:
    clean, spoiled = TraceEstimator(), TraceEstimator()
    for i in (0, 1, 9):
        statistics = batch(i)
        (statistics.loss if where == "loss" else (statistics.predictors or {})[where])[..., 3] = bad
        # Its queries may have survived all the same, but nothing is known that would explain what they show.
        shown, unseen = seen(i), seen(i)
        shown.trace[:, 3], unseen.queries[:, 3] = 1e9, 0.0
        estimate, reference = spoiled.estimate(statistics, sites=2), clean.estimate(batch(i), sites=2)
        spoiled.observe(shown)
        clean.observe(unseen)
    kept = torch.arange(16) != 3
    assert estimate.usable.tolist() == kept.tolist()
    assert estimate.trace[:, 3].tolist() == [0.0, 0.0]
    torch.testing.assert_close(estimate.trace[:, kept], reference.trace[:, kept], rtol=1e-9, atol=0.0)


def test_predictor_that_underflowed_counts_as_the_smallest_of_its_batch() -> None:
    steep = (batch(0).predictors or {})["top_gradient"]
    zero, least = steep.clone(), steep.clone()
    zero[0], least[0] = 0.0, steep[1:].min()
    for pair in ((zero, least), (torch.zeros(16, dtype=D), torch.ones(16, dtype=D))):
        named = [{**(batch(0).predictors or {}), "top_gradient": each} for each in pair]
        assert_same(*(trained().estimate(replace(batch(0), predictors=each), sites=2) for each in named))


def test_traces_seen_as_zero_or_not_representable() -> None:
    observation = seen(0)
    observation.trace[0] = 0.0
    observation.trace[1, 0] = 1e300  # beyond float32, in which it would be remembered
    estimator = learn(TraceEstimator(), batch(0), observation)
    observation.trace[1, 0] = NAN
    other = learn(TraceEstimator(), batch(0), observation)
    estimate = estimator.estimate(batch(1), sites=2)
    assert bool(estimate.trace.isfinite().all())
    assert_same(estimate, other.estimate(batch(1), sites=2))
    # A site where all traces were nil still follows its prior.
    steep = (batch(1).predictors or {})["top_gradient"]
    torch.testing.assert_close(estimate.trace[0] / estimate.trace[0, 0], steep / steep[0], rtol=1e-9, atol=0.0)


# Pilots


def test_pilots_as_they_are() -> None:
    per_site = traces(2, 16)
    for trace in (per_site[0], per_site):
        estimator = TraceEstimator(TraceSettings(source="pilots"))
        estimate = estimator.estimate(batch(0, trace=trace), sites=2)
        torch.testing.assert_close(estimate.trace, trace.expand(2, -1), rtol=0.0, atol=0.0)
        assert estimate.prediction is None
        estimator.observe(seen(0))
        assert_same(estimator.estimate(batch(0, trace=trace), sites=2), estimate)
    assert not TraceEstimator(TraceSettings(source="pilots")).learns


@pytest.mark.parametrize(
    ("pilots", "expected"),
    [
        # Each in units of its own mean, 3 and 2e6: (1/3 + 2) / 2, (2/3 + 1) / 2, (1 + 1) / 2, (2 + 0) / 2.
        (
            [[1.0, 2.0, 3.0, 6.0], [NAN] * 4, [4e6, 2e6, 2e6, 0.0]],
            [[1.0, 2.0, 3.0, 6.0], [7 / 6, 5 / 6, 1.0, 1.0], [4e6, 2e6, 2e6, 0.0]],
        ),
        # At the second site the third sample has twice the mean of 2; nothing is known of the fourth.
        (
            [[2e6, 1e6, NAN, NAN, 3e6], [1.0, 2.0, 4.0, NAN, 1.0]],
            [[2e6, 1e6, 4e6, NAN, 3e6], [1.0, 2.0, 4.0, NAN, 1.0]],
        ),
        ([[10.0, 10.0, -1.0], [NAN] * 3], [[10.0, 10.0, 0.0], [1.5, 1.5, 0.0]]),  # a negative estimate counts as zero
        ([[0.0, 0.0], [NAN, NAN]], [[0.0, 0.0], [0.0, 0.0]]),  # known, and zero
    ],
)
def test_missing_pilots_follow_those_of_other_sites_at_the_scale_of_their_own(
    pilots: list[list[float]], expected: list[list[float]]
) -> None:
    trace, follows = torch.tensor(pilots, dtype=D), torch.tensor(expected, dtype=D)
    statistics = SampleStatistics(loss=torch.ones(trace.shape[1], dtype=D), trace=trace)
    estimate = TraceEstimator(TraceSettings(source="pilots")).estimate(statistics, sites=len(trace))
    torch.testing.assert_close(estimate.trace, follows.nan_to_num(0.0))
    assert torch.equal(estimate.usable, follows[0].isfinite())


# Both


@pytest.mark.parametrize("strength", [0.0, 0.5, 7.0])
def test_shrinkage_is_the_stated_mean(strength: float) -> None:
    settings = TraceSettings(source="both", prior_strength=strength)
    pilots = traces(2, 16)
    number = torch.randint(0, 5, (2, 16), generator=torch.Generator().manual_seed(1)).to(D)
    pilots[number == 0] = NAN
    pilots[0, 5], number[0, 5] = NAN, 4.0  # all four were lost
    estimator = trained(settings)
    estimate = estimator.estimate(batch(9, trace=pilots, trace_queries=number), sites=2)
    prediction = trained().estimate(batch(9), sites=2).trace
    assert estimate.prediction is not None
    torch.testing.assert_close(estimate.prediction, prediction, rtol=1e-12, atol=0.0)
    nu = estimate.prior_strength
    assert nu.tolist() == [strength] * 2 if strength else bool((nu != START_PRIOR).all())
    for site in range(2):
        for sample in range(16):
            n, tr, pred = (float(x[site, sample]) for x in ((number - 1).clamp_min(0), pilots, prediction))
            expected = pred if math.isnan(tr) else (float(nu[site]) * pred + n * tr) / (float(nu[site]) + n)
            assert float(estimate.trace[site, sample]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("unit", "freedom"), [(1, 3.0), (2, 1.0)])  # four pilots, or two antithetic pairs
def test_first_prior_strength(unit: int, freedom: float) -> None:
    estimate = TraceEstimator(TraceSettings(source="both")).estimate(batch(0, **PILOTS), sites=2, unit=unit)
    assert estimate.prediction is not None
    # Before it learned, the prediction is levelled with the pilots at each site.
    level = PILOTS["trace"].mean() / estimate.prediction.mean(dim=1, keepdim=True)
    expected = (START_PRIOR * level * estimate.prediction + freedom * PILOTS["trace"]) / (START_PRIOR + freedom)
    torch.testing.assert_close(estimate.trace, expected, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize(("tau_squared", "freedom"), [(0.5, 9), (0.5, 2), (0.25, 19)])
def test_learned_prior_strength_is_two_over_the_error_of_the_prediction(tau_squared: float, freedom: int) -> None:
    # True traces scatter about the prediction as gamma variables of relative variance tau^2, estimates about these as
    # chi^2; every site is an independent repetition.
    sites, size, batches = 100, 200, 4
    generator = torch.Generator().manual_seed(freedom)
    with torch.random.fork_rng():
        torch.manual_seed(freedom)
        around = torch.distributions.Gamma(1.0 / tau_squared, 1.0 / tau_squared)
        estimator = TraceEstimator(TraceSettings(predictors=["top_gradient"]))
        for _ in range(batches):
            steep = torch.randn(sites, size, generator=generator, dtype=D).exp()
            statistics = SampleStatistics(loss=torch.rand(size, dtype=D), predictors={"top_gradient": steep})
            estimator.estimate(statistics, sites=sites)
            noise = torch.randn(freedom, sites, size, generator=generator, dtype=D).square().mean(dim=0)
            trace = steep * around.sample(torch.Size((sites, size))).double() * noise
            estimator.observe(TraceObservation(trace, torch.full_like(trace, freedom + 1.0)))
    learned = 2.0 / estimator.estimate(statistics, sites=sites).prior_strength
    standard_error = float(learned.std()) / math.sqrt(sites)
    # Three coefficients fitted to 800 observations lower the scatter by about 3 / 800 of itself, and ratios above 10
    # (with 2 degrees of freedom 2 in 10,000) are cut, which takes 0.10 off there.
    bias = 0.01 if freedom > 2 else 0.07
    assert abs(float(learned.mean()) - tau_squared) < 4 * standard_error + bias * (tau_squared + 2 / freedom)


# State


@pytest.mark.parametrize("change", ["fewer predictors", "another", "sites"])
def test_what_no_longer_fits_is_forgotten(change: str) -> None:
    statistics, sites = (batch(9, sites=3), 3) if change == "sites" else (batch(9), 2)
    named = dict(statistics.predictors or {})
    if change != "sites":
        activation = named.pop("activation")
        statistics = replace(statistics, predictors=named | ({"density": activation} if change == "another" else {}))
    resumed = TraceEstimator()
    resumed.load_state_dict(trained().state_dict())
    assert_same(resumed.estimate(statistics, sites=sites), TraceEstimator().estimate(statistics, sites=sites))


# Settings

ONES, ROWS = torch.ones(3, 16, dtype=D), r"\(3, 16\): must have one row for each of 2 sites"


@pytest.mark.parametrize(
    ("settings", "statistics", "setting", "message"),
    [
        (
            {"source": "oracle"},
            None,
            "traces.source",
            "'oracle': is not one of .* Choose from prediction, pilots, ",
        ),
        ({"window": -1}, None, "traces.window", "-1: must be 0 or more. Write, for example, 10"),
        ({"ridge": 0.0}, None, "traces.ridge", "0.0: must be a number above 0. Write, for example, 0.0"),
        ({"prior_strength": -1.0}, None, "traces.prior_strength", "-1.0: must be 0 or more. Write 0"),
        ({"prior_strength": 2.0}, None, "traces.prior_strength", "2.0: has no effect with source: prediction. Remove"),
        ({"source": "pilots", "window": 5}, None, "traces.window", "5: has no effect with source: pilots. Remove `win"),
        ({"source": "pilots", "ridge": 1.0}, None, "traces.ridge", "1.0: has no effect with source: pilots. Remove `r"),
        (
            {"source": "pilots", "predictors": ["loss"]},
            None,
            "traces.predictors",
            r"\['loss'\]: has no .* `predictor",
        ),
        ({"predictors": ["loss"], "window": 0}, None, "traces.predictors", "predict nothing with .* larger window"),
        ({"predictors": "loss"}, None, "traces.predictors", r"must be a list. Write \[loss\]"),
        ({"predictors": ["loss", "depth"]}, {}, "traces.predictors", r"'depth': is not .*: \['activation', 'top_"),
        ({"source": "pilots"}, {}, "traces.source", "'pilots': needs the statistic `trace`.*Set `strategy.pilot"),
        ({"source": "both"}, {}, "traces.source", "'both': needs the statistic `trace`.*source: prediction"),
        ({"source": "both"}, {"trace": ONES[0]}, "sample_statistics.trace_queries", "None: is needed to weigh pilots"),
        ({"source": "pilots"}, {"trace": ONES}, "sample_statistics.trace", rf"{ROWS}. Return \(s, b\), or \(b,\)"),
        ({"source": "both"}, {"trace": ONES[0], "trace_queries": ONES}, "sample_statistics.trace_queries", ROWS),
        ({}, {"sites": 3}, "sample_statistics.predictors.activation", ROWS),
    ],
)
def test_settings_and_statistics_without_sense_are_refused(
    settings: dict[str, Any], statistics: dict[str, Any] | None, setting: str, message: str
) -> None:
    for given in (settings, TraceSettings(**settings)):
        with pytest.raises(SettingError, match=message) as caught:
            TraceEstimator(given).estimate(batch(0, **(statistics or {})), sites=2)
        assert caught.value.setting == setting
        if statistics is None:  # refused before anything is computed
            with pytest.raises(SettingError, match=message):
                TraceEstimator(given)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"predictors"}),
        ({"predictors": ["loss"]}, set()),
        ({"predictors": ["loss", "activation"]}, {"predictors.activation"}),
        ({"predictors": ["top_gradient"], "window": 0}, {"predictors.top_gradient"}),
        ({"source": "pilots"}, {"trace", "trace_queries"}),
        ({"source": "both"}, {"trace", "trace_queries", "predictors"}),
    ],
)
def test_only_what_is_read_is_requested(settings: dict[str, Any], expected: set[str]) -> None:
    estimator = TraceEstimator(settings)
    assert estimator.requests == expected
    assert estimator.learns == (estimator.settings.source != "pilots" and estimator.settings.window > 0)
