"""The exact head: autograd's gradient of the head's parameters, for no query, and out of the allocators' sight."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from flops_lightning.allocators import (
    CostAwareAllocator,
    EqualAllocator,
    GaussianAllocator,
    OptimalAllocator,
    QueryAllocator,
)
from flops_lightning.callbacks import QueryAllocatorCallback
from flops_lightning.errors import SettingError
from flops_lightning.network.staging import Stage, StagedNetwork
from flops_lightning.objectives import zero_one_error
from flops_lightning.strategies import LikelihoodRatio, PilotSpec, SiteSpec
from flops_lightning.tasks import ForwardImageClassifier
from tests.reference.footprint import everything
from tests.reference.layouts import TOKEN_SITES, vit_for
from tests.reference.networks import (
    TokenMean,
    assert_entries,
    autograd_gradient,
    bound,
    cross_entropy,
    estimated,
    gradients,
    shaken,
    squared_error,
    tiny_vit,
)

BODY = {"stages": ["embed", "blocks.2"]}
LAYOUTS: dict[str, list[dict[str, Any]]] = {
    "group": [BODY, {"stages": ["pool", "head"], "name": "head"}],
    "block": [{"stages": ["embed", "head"], "kind": "block"}],
    "linear": [{"stages": ["embed", "head"], "kind": "linear"}],
    "default": [],
}
TOKENS = [{"stages": ["0", "1"]}, {"stages": ["2", "4"]}]


def head_of(strategy: LikelihoodRatio) -> Any:
    (head,) = strategy.exact_sites
    return head


@pytest.mark.parametrize(
    ("layout", "variant"),
    [*((layout, "baseline") for layout in LAYOUTS), *(("group", v) for v in ("plain", "leave_one_out", "antithetic"))],
)
def test_the_heads_gradient_is_autograds(layout, variant, images):
    """It spends no queries, and all other sites are estimated as without it."""
    vit = vit_for(layout)
    _, usual = estimated(bound(vit, cross_entropy, LAYOUTS[layout], variant=variant), *images)
    strategy = bound(vit, cross_entropy, LAYOUTS[layout], variant=variant, exact_head=True)
    clean, found = estimated(strategy, *images)
    truth, head, meter = autograd_gradient(vit, cross_entropy, *images), head_of(strategy), strategy.meter
    norm = {"norm.weight", "norm.bias"} if layout in ("group", "default") else set()
    assert set(head.parameters) == {"head.weight", "head.bias"} | norm
    assert_entries(found, {name: truth[name] for name in head.parameters}, rtol=1e-10, atol=1e-12)
    assert_entries(found, {name: g for name, g in usual.items() if g is not None and name not in head.parameters})
    assert (meter.sites[head.name].queries, meter.total().queries) == (0, 20 * 4 * len(strategy.sites))
    assert strategy.budget.queries_per_sample == (20,) * len(strategy.sites)
    inside = strategy._costs.from_stage[head.first]  # a local VJP, or the layer's pass again
    factor = 1 if head.layers else 3
    assert meter.sites[head.name].forward_equivalents == pytest.approx(4 * factor * inside)
    assert strategy.estimate(clean, traces=True).observation.trace.shape == (len(strategy.sites), 4)


def test_nothing_of_the_network_is_differentiated_at_a_linear_head(tokens_net, tokens):
    """Only the loss sees a tensor that requires a gradient."""
    seen: list[bool] = []
    for stage in tokens_net:
        stage.register_forward_hook(lambda _, args, output: seen.append(output.requires_grad))
    asked: list[bool] = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        asked.append(output.requires_grad)
        return squared_error(output, target)

    sites = [{"stages": ["0", "4"], "kind": "linear"}]
    strategy = bound(tokens_net, loss, sites, exact_head=True)
    before = everything(tokens_net)
    strategy.estimate(strategy.clean_pass(*tokens))
    assert True in asked
    assert not any(seen)
    assert everything(tokens_net) == before


def test_site_by_site_the_head_goes_first(images):
    vit = tiny_vit().eval()
    sites = [{"stages": ["embed", "blocks.0"]}, {"stages": ["blocks.1", "blocks.2"]}, LAYOUTS["group"][1]]
    strategy = bound(vit, cross_entropy, sites, update="site_by_site", exact_head=True)
    assert strategy.update_groups == (("head",), ("blocks.1..blocks.2",), ("embed..blocks.0",))
    clean = strategy.clean_pass(*images)
    counts = torch.tensor([[2, 0, 1, 3], [1, 1, 4, 0]])
    estimate = strategy.estimate(clean, counts, ["head"], traces=True)
    assert (estimate.queries, estimate.lost_batch, estimate.observation.trace.isnan().all()) == (0, False, True)
    found = gradients(vit)
    truth = autograd_gradient(vit, cross_entropy, *images)
    assert {name for name, gradient in found.items() if gradient is not None} == set(head_of(strategy).parameters)
    with torch.no_grad():
        for name, parameter in head_of(strategy).parameters.items():
            torch.testing.assert_close(found[name], truth[name], rtol=1e-10, atol=1e-12)
            parameter.sub_(0.1 * found[name])
    clean = strategy.refresh(clean, ["head"])
    torch.testing.assert_close(clean.output, vit(images[0]).detach())
    estimate = strategy.estimate(clean, counts, ["blocks.1..blocks.2"])
    assert estimate.queries == 6
    assert gradients(vit)["head.weight"] is None


def test_a_sample_without_a_loss_contributes_nothing(images):
    x, y = images
    vit = tiny_vit()
    strategy = bound(vit, cross_entropy, LAYOUTS["group"], exact_head=True)
    broken = x.clone()
    broken[1] = float("nan")
    with pytest.warns(RuntimeWarning, match="lost every query"):
        _, found = estimated(strategy, broken, y)
    rest = [0, 2, 3]
    truth = autograd_gradient(vit, cross_entropy, x[rest], y[rest])
    for name in head_of(strategy).parameters:
        torch.testing.assert_close(found[name], truth[name] * 3 / 4, rtol=1e-10, atol=1e-12)
    clean = strategy.clean_pass(torch.full_like(x, float("nan")), y)
    with pytest.warns(RuntimeWarning, match="lost every query"):
        assert strategy.estimate(clean).lost_batch
    assert set(gradients(vit).values()) == {None}


def test_only_the_trained_parameters_of_the_head_get_a_gradient(images):
    vit = tiny_vit()
    vit.norm.weight.requires_grad_(False)
    vit.head.bias.requires_grad_(False)
    strategy = bound(vit, cross_entropy, LAYOUTS["group"], exact_head=True)
    _, found = estimated(strategy, *images)
    assert found["norm.weight"] is None
    assert found["head.bias"] is None
    truth = autograd_gradient(vit, cross_entropy, *images)
    torch.testing.assert_close(found["norm.bias"], truth["norm.bias"], rtol=1e-10, atol=1e-12)


IMAGES, LABELS = torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 5
MODEL = {
    "model_name": "vit_tiny_patch16_224",
    "model_kwargs": {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 3, "num_heads": 2},
    "num_classes": 5,
}


def fitted(tmp_path: Any, allocator: QueryAllocator, **settings: Any) -> ForwardImageClassifier:
    pl.seed_everything(0, verbose=False)
    sites = [
        SiteSpec(name="body", stages=["embed", "blocks.1"], queries_per_sample=4),
        SiteSpec(name="top", stages=["blocks.2"], queries_per_sample=4),
        SiteSpec(name="head", stages=["pool", "head"]),
    ]
    strategy = LikelihoodRatio(sites=sites, exact_head=True, token_sigma=True, learn_sigma=0.01, **settings)
    task = ForwardImageClassifier(**MODEL, strategy=strategy)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, max_epochs=2, log_every_n_steps=1,
        callbacks=[QueryAllocatorCallback(allocator=allocator)],
    )  # fmt: skip
    trainer.fit(task, DataLoader(TensorDataset(IMAGES, LABELS), batch_size=8))
    return task


@pytest.mark.parametrize(
    ("allocator", "settings"),
    [
        (EqualAllocator, {}),
        (OptimalAllocator, {}),
        (OptimalAllocator, {"update": "site_by_site"}),
        (CostAwareAllocator, {}),
        (GaussianAllocator, {"pilots": PilotSpec("deepest", 2)}),
    ],
)
def test_a_task_trains_with_every_allocator(tmp_path, allocator, settings, monkeypatch):
    binds: list[Any] = []
    bind = LikelihoodRatio.bind
    monkeypatch.setattr(LikelihoodRatio, "bind", lambda *args: (binds.append(args), bind(*args)))
    task = fitted(tmp_path, allocator(), **settings)
    meter = task.strategy.meter
    assert meter.sites["head"].queries == 0
    if settings.get("pilots"):
        assert (meter.sites["body"].pilots, meter.sites["top"].pilots) == (0, 2 * 24 * 2), "the deepest below the head"
    if allocator is not CostAwareAllocator:
        assert {meter.sites[name].queries for name in ("body", "top")} == {4 * 24 * 2}
    assert len(binds) == 1, "the parameters of the head are known to be trained"
    assert all(width.sigma != SiteSpec.sigma for width in task.strategy.widths.values())
    assert task.strategy.widths["body"].relative.shape == (5,)


@pytest.mark.parametrize(
    ("sites", "frozen", "settings", "message"),
    [
        (
            TOKEN_SITES["together"],
            (),
            {},
            r"exact_head = True: site '0..4' perturbs the last layer together with others",
        ),
        (
            TOKENS,
            (),
            {"pilots": PilotSpec("2..4", 4)},
            r"pilots.sites = '2..4': spends no queries, its gradient is exact",
        ),
        (
            TOKENS,
            (),
            {"pilots": PilotSpec("deepest", 4), "update": "site_by_site"},
            r"pilots.reuse = True: pilots are stale once the exact head above them was updated",
        ),
        ([{"stages": ["0", "3"]}], (4,), {}, r"exact_head = True: no site has its noise at the network's output.*'4'"),
        ([{"stages": ["4"]}], range(4), {}, r"exact_head = True: leaves no site for queries.*Backprop"),
    ],
)
def test_settings_that_are_refused(sites, frozen, settings, message, tokens_net):
    for i in frozen:
        tokens_net[i].requires_grad_(False)
    with pytest.raises(SettingError, match=message):
        bound(tokens_net, squared_error, sites, exact_head=True, **settings)


def test_a_layer_below_the_output_is_no_head():
    last = nn.Sequential(nn.Linear(3, 3), nn.GELU(), nn.Linear(3, 2))
    net = shaken(nn.Sequential(nn.Linear(3, 3), TokenMean(), last))
    with pytest.raises(SettingError, match=r"no site has its noise at the network's output"):
        bound(net, squared_error, [{"stages": ["0", "2"], "kind": "linear"}], exact_head=True)


def test_a_layer_whose_output_is_changed_afterwards_is_no_head(tokens):
    """A stage written by hand may do more than its one member does."""
    net = shaken(nn.ModuleDict({"body": nn.Linear(3, 3), "head": nn.Linear(3, 2)}))
    stages = (
        Stage("body", lambda x: net["body"](x).mean(1), ("body",)),
        Stage("head", lambda x: net["head"](x).softmax(1), ("head",)),
    )
    strategy = LikelihoodRatio(sites=[SiteSpec(["body", "head"], kind="linear")], exact_head=True)
    strategy.bind(StagedNetwork(net, stages), squared_error)
    with pytest.raises(SettingError, match=r"exact_head = True: the output of 'head' is not that of the network"):
        strategy.clean_pass(*tokens)


def through_numpy(output: Tensor, target: Tensor) -> Tensor:
    return torch.from_numpy(output.numpy()).logsumexp(1)


@pytest.mark.parametrize("loss", [zero_one_error, through_numpy])
def test_a_loss_without_a_derivative_is_refused(loss, images):
    strategy = bound(tiny_vit(), loss, LAYOUTS["group"], exact_head=True)
    with pytest.raises(SettingError, match=rf"loss = '{loss.__name__}': has no derivative.*Write exact_head: false"):
        strategy.clean_pass(*images)


def test_a_task_names_the_loss_that_has_no_derivative(tmp_path):
    sites = [SiteSpec(name="body", stages=["embed", "blocks.2"]), SiteSpec(name="head", stages=["pool", "head"])]
    task = ForwardImageClassifier(
        **MODEL, strategy=LikelihoodRatio(sites=sites, exact_head=True, seed=0),
        loss="flops_lightning.objectives.zero_one_error",
    )  # fmt: skip
    with pytest.raises(SettingError, match=r"loss = 'flops_lightning.objectives.zero_one_error': has no derivative"):
        task.sample_statistics((IMAGES[:4], LABELS[:4]))
