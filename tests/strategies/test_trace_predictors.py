"""Numbers of the clean pass that predict traces, against autograd through the whole network, one sample at a time."""

import copy
import math
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flops_lightning.errors import SettingError
from flops_lightning.network.staging import stage_network
from flops_lightning.strategies import LikelihoodRatio, SiteSpec
from tests.reference.layouts import TOKEN_SITES, VIT_SITES, vit_for
from tests.reference.networks import (
    Loss,
    TokenMean,
    assert_entries,
    bound,
    cross_entropy,
    gradients,
    shaken,
    squared_error,
    token_network,
)

GRADIENTS = ("output_gradient", "head_gradient", "top_gradient")


def smoothed_labels(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, reduction="none", label_smoothing=0.2)


def gradient_sq_norm(module: nn.Module, loss: Loss, x: Tensor, y: Tensor, entered: nn.Module | None) -> Tensor:
    """``(b,)`` squared norm of each sample's dL/dh, h what enters a module; None: the network's output."""
    found = []
    for b in range(len(x)):
        kept: list[Tensor] = []

        def keep(_: nn.Module, args: tuple[Tensor, ...], kept: list[Tensor] = kept) -> tuple[Tensor, ...]:
            kept.append(args[0])
            return (args[0].clone(), *args[1:])  # a module may work in place

        handle = None if entered is None else entered.register_forward_pre_hook(keep)
        output = module(x[b : b + 1].clone().requires_grad_(True).clone())
        if handle is not None:
            handle.remove()
        (gradient,) = torch.autograd.grad(loss(output, y[b : b + 1]).sum(), kept[0] if kept else output)
        found.append(gradient.square().sum())
    return torch.stack(found)


def mean_squares(strategy: LikelihoodRatio, x: Tensor, tokens: slice | None) -> dict[str, Tensor]:
    """``(b,)`` mean square of what enters each inner stage at which a site begins (a layer's) or which follows a site.

    Of the tokens that the head reads, as long as there are tokens, and where these are not all also of all.
    """
    found = {}
    for site in strategy.sites:
        i = site.first if site.layers else site.last + 1
        if 0 < i < len(strategy.network):
            h = strategy.network.run(x.clone(), 0, i).detach()
            name = f"activation.{strategy.network.stages[i].name}"
            everything = torch.stack([sample.square().mean() for sample in h])
            if tokens is None or h.dim() == 2:
                found[name] = everything
            else:
                found[name] = torch.stack([sample[tokens].square().mean() for sample in h])
                found[f"{name}.all"] = everything
    return found


def assert_predictors(
    module: nn.Module,
    strategy: LikelihoodRatio,
    x: Tensor,
    y: Tensor,
    *,
    head: nn.Module,
    top: nn.Module,
    read: slice | None = None,
) -> None:
    module.eval()
    expected = {
        name: gradient_sq_norm(module, strategy.loss, x, y, entered)
        for name, entered in zip(GRADIENTS, (None, head, top), strict=True)
    }
    expected |= mean_squares(strategy, x, read)
    for _ in range(3):  # on the first nothing was asked for before the clean pass
        with torch.no_grad():  # as the callback calls it
            found = strategy.sample_statistics(strategy.clean_pass(x, y), {"predictors"}).predictors
        assert set(found) == set(expected)
        for name, value in expected.items():
            assert not found[name].requires_grad
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", [cross_entropy, smoothed_labels])
@pytest.mark.parametrize(
    ("layout", "kwargs", "read"),
    [
        ("group", {}, slice(0, 1)),
        ("block", {"global_pool": "avg", "reg_tokens": 2}, slice(3, None)),
        ("linear", {}, slice(0, 1)),
        ("together", {}, slice(0, 1)),
        ("block", {"global_pool": "map"}, None),
    ],
)
def test_vit(layout, kwargs, read, loss, images):
    """``top``: what enters the final norm and the pooling; ``head``: what enters the last linear layer."""
    vit = vit_for(layout, **kwargs)
    strategy = bound(vit, loss, VIT_SITES[layout], chunk_rows=3)
    assert_predictors(vit, strategy, *images, head=vit.head, top=vit.norm, read=read)


@pytest.mark.parametrize("layout", TOKEN_SITES)
def test_sequential(layout, tokens_net, tokens):
    """The head is the last stage, unless the last two are called pool and head."""
    strategy = bound(tokens_net, squared_error, TOKEN_SITES[layout])
    assert_predictors(tokens_net, strategy, *tokens, head=tokens_net[4], top=tokens_net[4])
    named = nn.Sequential(OrderedDict(zip(("0", "1", "2", "pool", "head"), tokens_net, strict=True)))
    sites = [{"stages": ["0", "2"]}, {"stages": ["pool", "head"]}]
    assert_predictors(
        named, bound(named, squared_error, sites), *tokens, head=named.get_submodule("head"), top=named[3]
    )


@pytest.mark.parametrize("last", [0, 1])
def test_a_head_alone_is_taught(last, images):
    """Then no site starts below the final norm, and what enters it has to be run again the first time."""
    vit = vit_for("group")
    for name, parameter in vit.named_parameters():
        parameter.requires_grad_(name.startswith(("norm", "head")[last:]))
    strategy = bound(vit, cross_entropy, [{"stages": [("pool", "head")[last], "head"]}], chunk_rows=3)
    assert_predictors(vit, strategy, *images, head=vit.head, top=vit.norm, read=slice(0, 1))


@pytest.mark.parametrize("kind", ["block", "linear"])
def test_stages_that_work_in_place(kind, tokens):
    net = shaken(
        nn.Sequential(
            nn.SiLU(inplace=True), nn.Linear(3, 4), nn.Sequential(nn.SiLU(inplace=True), nn.Linear(4, 3)), TokenMean(),
            nn.Sequential(nn.SiLU(inplace=True), nn.Linear(3, 2), nn.SiLU(inplace=True)),
        )
    )  # fmt: skip
    x, y = tokens
    before = x.clone()
    strategy = bound(net, squared_error, [{"stages": ["0", "4"], "kind": kind}])
    assert_predictors(net, strategy, x, y, head=net[4], top=net[4])
    torch.testing.assert_close(x, before, rtol=0, atol=0)


@pytest.mark.parametrize("where", ["input", "loss"])
def test_a_sample_with_a_nan_loss_does_not_touch_the_others(where, images):
    vit, (x, y) = vit_for("group"), images
    clean = bound(vit, cross_entropy, VIT_SITES["group"])
    expected = clean.sample_statistics(clean.clean_pass(x, y), {"predictors"}).predictors

    def loss(output: Tensor, target: Tensor) -> Tensor:
        nan = torch.where(target == y[2], math.nan, 1.0) if where == "loss" else 1.0
        return nan * cross_entropy(output, target)

    x = x.clone()
    if where == "input":
        x[2, 0, 3, 3] = math.nan
    strategy = bound(vit, loss, VIT_SITES["group"])
    statistics = strategy.sample_statistics(strategy.clean_pass(x, y), {"predictors"})
    assert statistics.loss.isnan().tolist() == [False, False, True, False]
    rest = torch.tensor([0, 1, 3])
    for name, value in expected.items():
        torch.testing.assert_close(statistics.predictors[name][..., rest], value[..., rest], rtol=1e-12, atol=0)


def test_dropout_is_off_and_the_network_s_gradients_are_left_alone(tokens):
    net = token_network()
    dropped = copy.deepcopy(net)
    dropped[4] = nn.Sequential(nn.Dropout(0.5), net[4])
    dropped.train()
    found = []
    for each, head in ((net, "4"), (dropped, "4")):
        strategy = bound(each, squared_error, [{"stages": ["0", "3"]}, {"stages": [head]}])
        found.append(strategy.sample_statistics(strategy.clean_pass(*tokens), {"predictors"}).predictors)
        assert set(gradients(each).values()) == {None}
    assert_entries(found[1], found[0])


def test_under_autocast_weights_keep_their_graph(images):
    """Copies of the weights in half precision, made without a graph, would cut the gradient off."""
    vit, x = vit_for("group").float(), images[0].float()
    strategy = bound(vit, cross_entropy, [{**site, "sigma": 1.0} for site in VIT_SITES["group"]])
    exact = strategy.sample_statistics(strategy.clean_pass(x, images[1]), {"predictors"}).predictors
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = strategy.sample_statistics(strategy.clean_pass(x, images[1]), {"predictors"}).predictors
    for name, value in exact.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], value, rtol=0.1, atol=0)


def test_a_loss_without_derivative_is_refused_with_the_remedy(tokens_net, tokens):
    sites = [SiteSpec(stages=["0", "3"], name="body"), SiteSpec(stages=["4"], name="last")]
    strategy = LikelihoodRatio(sites=sites, seed=0)
    strategy.bind(stage_network(tokens_net), lambda output, target: (output > target).double().flatten(1).mean(1))
    clean = strategy.clean_pass(*tokens)
    with pytest.raises(SettingError, match=r"needs a differentiable loss.*Write predictors: \[loss, activation\]"):
        strategy.sample_statistics(clean, {"predictors"})
    names = strategy.sample_statistics(clean, {"predictors.activation"}).predictors
    assert names is not None
    assert set(names) == {"activation.4"}
