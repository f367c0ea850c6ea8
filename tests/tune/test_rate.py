import math

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from flops_lightning.allocators import OptimalAllocator
from flops_lightning.callbacks import QueryAllocatorCallback
from flops_lightning.errors import SettingError
from flops_lightning.strategies import Backprop, MeZO
from flops_lightning.tasks import ForwardImageClassifier, ForwardModule
from flops_lightning.tune.rate import RateSearch, Trial, bottom, lowest
from flops_lightning.tune.search import Tuned, text, tune
from tests.digits import MODEL, QUIET, two_sites

CURVATURES, FLOOR = (1.0, 0.1), 0.1
FEW = {"rates": 3, "steps": 8, "widths": 3, "batches": 1}


class Quadratic(ForwardModule):
    """``FLOOR + sum_i c_i w_i^2 / 2`` from ``w = (1, 1)``: one sample for each weight, all in one batch."""

    def __init__(self, lr: float, **settings) -> None:
        super().__init__(strategy=Backprop(), optimizer={"name": "sgd", "lr": lr}, **settings)
        self.net = nn.Sequential(nn.Linear(2, 1, bias=False))
        nn.init.ones_(self.net[0].weight)
        self.stage(self.net)

    def loss(self, outputs, targets):
        return outputs[:, 0].square() + FLOOR


class TwoSamples(LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        x = torch.diag(torch.tensor(CURVATURES).sqrt())
        return DataLoader(TensorDataset(x, torch.zeros(2)), batch_size=2)


def late_loss(rate: float, steps: int) -> float:
    """Of gradient descent on that quadratic, in closed form, over the last quarter of the steps."""
    w = [[(1 - rate * c) ** k for c in CURVATURES] for k in range(steps)]
    losses = [FLOOR + sum(c * v**2 for c, v in zip(CURVATURES, each, strict=True)) / 2 for each in w]
    return float(np.mean(losses[-(steps // 4) :]))


def test_on_a_quadratic_the_rate_found_is_that_of_the_closed_form_far_from_the_configured_one():
    task, steps = Quadratic(lr=1e-2), 16
    rate = tune(task, TwoSamples(), QUIET, rates=8, steps=steps, widths=0).rate
    for trial in rate.trials:
        assert trial.loss == pytest.approx(late_loss(trial.rate, trial.steps), rel=1e-4)
    best = min(late_loss(10**place, steps) for place in np.linspace(-4, 1, 501))
    assert late_loss(rate.found, steps) <= 1.05 * best
    assert rate.found > 30 * rate.given  # beyond the first grid
    assert torch.equal(task.net[0].weight, torch.ones(1, 2))
    assert task.optimizer_settings.lr == rate.given == 1e-2


@pytest.mark.parametrize("rises", [0.0, 2.0])
def test_a_grid_grows_while_its_edge_is_best_and_not_for_ever(rises):
    seen = []

    def loss(place: float) -> float:
        seen.append(place)
        return 1.0 + (place - 2.2) ** 2 if rises else 10.0**-place

    found = lowest(loss, 0.0, 0.5, below=1, above=1)
    assert list(found) == sorted(seen)
    assert len(seen) == len(set(seen)) == 7  # four more than at first
    assert max(seen) == 2.5


def test_the_lowest_point_of_a_noisy_parabola_beats_the_lowest_loss():
    places = np.linspace(-1, 1, 5)
    losses = {float(p): math.exp((p - 0.2) ** 2 / 4 + 0.001 * (-1) ** i) for i, p in enumerate(places)}
    assert bottom(losses) == pytest.approx(0.2, abs=0.02)
    assert bottom({-1.0: 1.0, 0.0: math.inf, 1.0: 2.0}) == -1.0
    assert bottom({-1.0: 3.0, 0.0: 2.0, 1.0: 1.0}) == 1.0
    cliff = {-1.0: 1.2, -0.5: 1.05, 0.0: 1.0, 0.5: 1.05, 1.0: 1e9}
    assert bottom(cliff) == pytest.approx(0.0, abs=0.1)


def test_a_run_that_loses_its_loss_scores_infinite():
    assert Trial(0.1, 8, (3.0, 2.0, 1.0, 0.5)).loss == 0.5
    assert Trial(0.1, 8, (3.0, 2.0, 1.0, math.nan)).loss == math.inf


@pytest.mark.slow
def test_a_tuned_task_trains_as_one_that_was_not(make_task, make_trainer, digits):
    weights = []
    for tuned in (False, True):
        task = make_task(strategy=two_sites(learn_sigma=0.1))
        callback = QueryAllocatorCallback(allocator=OptimalAllocator())
        task.strategy.estimate(task.strategy.clean_pass(torch.randn(8, 1, 8, 8), torch.arange(8)))  # learns widths
        task.zero_grad()
        if tuned:
            random, state = torch.get_rng_state(), task.strategy.state_dict()
            found = tune(task, digits, {**QUIET, "callbacks": [callback]}, **FEW)
            assert set(found.widths) == {"body", "head"}
            assert len(found.rate.trials) >= 8
            assert torch.equal(torch.get_rng_state(), random)
            assert task.strategy.state_dict() == state
            assert task.strategy.sigmas == {"body": 0.01, "head": 0.01}
            assert all(p.grad is None for p in task.parameters())
        make_trainer(callback).fit(task, datamodule=digits)
        weights.append(task.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_queries_that_explode_are_a_rate_that_is_too_high_and_no_error(make_task, digits):
    task = make_task(strategy=MeZO(seed=0), optimizer={"name": "sgd", "lr": 10.0}, max_skipped_steps=0)
    found = tune(task, digits, QUIET, rates=8, steps=8, widths=0).rate
    assert 0.001 < found.found < 10.0
    assert any(trial.loss == math.inf for trial in found.trials)


class OwnOptimizer(Quadratic):
    def configure_optimizers(self):
        return super().configure_optimizers()


REFUSED = {
    "no task": (lambda: nn.Linear(1, 1), {}, "model = 'Linear': is not a ForwardModule"),
    "no strategy": (lambda: ForwardImageClassifier(**MODEL), {}, "strategy = None: training needs a strategy."),
    "processes": (
        lambda: Quadratic(lr=0.1), {"settings": {**QUIET, "devices": 2}},
        "trainer.devices = 2: settings are tried in one process.",
    ),
    "nothing": (lambda: Quadratic(lr=0.1), {"rates": 0, "widths": 0}, "rates = 0: and widths 0 leave nothing"),
    "few rates": (lambda: Quadratic(lr=0.1), {"rates": 2}, "rates = 2: must be 3 or more. Write 8, or 0"),
    "few steps": (lambda: Quadratic(lr=0.1), {"steps": 4}, "steps = 4: must be 8 or more."),
    "own optimiser": (lambda: OwnOptimizer(lr=0.1), {}, "model = 'OwnOptimizer': configures its own optimiser"),
    "all diverge": (lambda: Quadratic(lr=1e30), {"steps": 64}, r"lr = 1e\+30: diverges, and so do the 20 other rates"),
    "callback": (
        lambda: Quadratic(lr=0.1), {"settings": {**QUIET, "accumulate_grad_batches": 2}},
        "trainer.accumulate_grad_batches = 2: has no effect under manual optimisation.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_tuned_is_refused(name):
    make, given, message = REFUSED[name]
    with pytest.raises(SettingError, match=message):
        tune(make(), TwoSamples(), **{"settings": QUIET, **given})


def test_a_search_says_when_no_rate_helped_in_so_few_steps():
    trials = (Trial(0.1, 4, (1.0, 1.0, 1.0, 1.1)), Trial(0.2, 8, (1.0, 0.9, 0.8, 0.7)))
    remark = "No rate lowered the loss in so few steps: give more (--steps), or more queries."
    assert text(Tuned(rate=RateSearch(0.1, 0.2, trials[:1]))).endswith(remark)
    assert remark not in text(Tuned(rate=RateSearch(0.1, 0.2, trials)))
