"""Settings of sites: what they resolve to, and what is refused."""

import math
from typing import Any

import pytest
from torch import nn

from flops_lightning.errors import SettingError
from flops_lightning.network.staging import stage_network
from flops_lightning.strategies import LikelihoodRatio
from flops_lightning.strategies.site_specs import SiteSpec
from flops_lightning.strategies.sites import resolve_sites
from tests.reference.networks import freeze, tiny_vit

REST = {"stages": ["1", "4"]}
KINDS = ("group", "block", "linear")


def resolved(module: nn.Module, *specs: dict[str, Any]) -> list[Any]:
    return list(resolve_sites(stage_network(module), [SiteSpec(**spec) for spec in specs]))


@pytest.mark.parametrize(
    ("specs", "names"),
    [
        ([{"stages": ["0", "3"]}, {"stages": ["4"]}], ["0..3", "4"]),
        ([{"stages": ["4"], "name": "top"}, {"stages": ["0", "3"]}], ["0..3", "top"]),
        ([{"stages": ["0", "4"], "kind": "block"}], ["0", "2", "3", "4"]),
        ([{"stages": ["0", "4"], "kind": "block", "name": "b"}], ["b.0", "b.2", "b.3", "b.4"]),
        ([{"stages": ["0", "4"], "kind": "linear"}], ["0", "2", "3.0", "4"]),
        ([{"stages": ["0", "4"], "kind": "linear", "name": "l"}], ["l.0", "l.2", "l.3.0", "l.4"]),
        ([{"stages": ["0", "4"], "kind": "linear", "together": True}], ["0..4"]),
        ([{"stages": ["0", "4"], "kind": "linear", "together": True, "name": "all"}], ["all"]),
    ],
)
def test_names_from_bottom_to_top(specs, names, tokens_net):
    assert [site.name for site in resolved(tokens_net, *specs)] == names


def test_settings_and_stages_of_every_site_of_a_range(tokens_net):
    sites = resolved(tokens_net, {"stages": ["0", "4"], "kind": "block", "sigma": 0.3, "queries_per_sample": 6})
    assert {(site.sigma, site.queries_per_sample) for site in sites} == {(0.3, 6)}
    assert [(site.first, site.last, site.start) for site in sites] == [(0, 0, 1), (2, 2, 3), (3, 3, 4), (4, 4, 5)]
    single = resolved(tokens_net, {"stages": ["0", "4"], "kind": "linear"})
    assert [(site.first, site.start) for site in single] == [(0, 0), (2, 2), (3, 3), (4, 4)]
    (joint,) = resolved(tokens_net, {"stages": ["0", "4"], "kind": "linear", "together": True})
    assert (joint.first, joint.start, len(joint.layers)) == (0, 0, 4)


def test_a_network_of_one_stage_has_a_group_but_no_default():
    net = nn.Sequential(nn.Linear(3, 2))
    (site,) = resolved(net, {"stages": ["0"]})
    assert (site.first, site.last, site.start) == (0, 0, 1)
    with pytest.raises(SettingError, match=r"one stage.*name the sites, or use MeZO"):
        resolved(net)


def test_patterns_choose_modules():
    vit = tiny_vit()
    freeze(vit, *(name for name, _ in vit.named_parameters() if ".attn." not in name and not name.startswith("head")))
    sites = resolved(
        vit,
        {"stages": ["embed", "head"], "kind": "linear", "modules": ["*.qkv", "head"]},
        {"stages": ["blocks.0", "blocks.2"], "kind": "linear", "modules": ["blocks.?.attn.proj"], "together": True},
    )
    assert [site.name for site in sites] == [
        "blocks.0.attn.qkv", "blocks.1.attn.qkv", "blocks.0..blocks.2", "blocks.2.attn.qkv", "head",
    ]  # fmt: skip


def test_noise_is_put_where_it_is_read():
    """Only the class token of the last block is read; what follows that block's attention is token by token."""
    vit = tiny_vit()
    freeze(vit, "cls_token", "pos_embed")
    sites = resolved(vit, {"stages": ["embed", "head"], "kind": "linear"})
    assert {site.name for site in sites if site.layers[0].tokens == slice(0, 1)} == {
        "norm", *(f"blocks.2.{part}" for part in ("attn.proj", "norm2", "mlp.fc1", "mlp.fc2")),
    }  # fmt: skip
    assert {site.layers[0].tokens for site in sites if site.layers[0].tokens != slice(0, 1)} == {None}


@pytest.mark.parametrize(
    ("specs", "setting", "problem"),
    [
        ([{"stages": ["9"]}], "[0].stages", r"'9': is not a stage .*\['0', '1', '2', '3', '4'\]"),
        ([{"stages": ["0"]}, {"stages": ["1", "blocks.1"]}], "[1].stages", "'blocks.1'"),
        ([{"stages": []}], "[0].stages", "first, last"),
        ([{"stages": ["0", "1", "2"]}], "[0].stages", "first, last"),
        ([{"stages": ["3", "1"]}], "[0].stages", "backwards"),
        ([{"stages": ["0", "4"]}], "[0].stages", "whole network.*Backprop"),
        *(([{"stages": ["1"], "kind": kind}], "[0].stages", "no trainable parameter") for kind in KINDS),
        *(
            ([{"stages": ["0"], "sigma": sigma}, REST], "[0].sigma", "above 0.*0.01")
            for sigma in (0, -1e-3, math.nan, math.inf)
        ),
        *(
            ([REST, {"stages": ["0"], "queries_per_sample": n}], "[1].queries_per_sample", "above 0")
            for n in (0, -4, math.nan)
        ),
        ([{"stages": ["0"], "kind": "blocks"}, REST], "[0].kind", "Choose from linear, block, group"),
        (
            [{"stages": ["0"], "modules": ["0"]}, REST],
            "[0].modules",
            r"\['0'\]: is given together with stages.*one of the two",
        ),
        ([{"stages": ["0"], "kind": "block", "together": True}, REST], "[0].kind", "does not take `together`"),
        ([{"stages": ["0"], "kind": "linear", "modules": ["3*"]}, REST], "[0].modules", r"3\*"),
        ([{"stages": ["0"], "kind": "linear", "modules": ["0", "typo"]}, REST], "[0].modules", "typo"),
        ([{"stages": ["0"], "name": "a"}, {**REST, "name": "a"}], "", "'a': is the name of two"),
        ([{"stages": ["0", "2"]}, REST], "", r"'0\.\.2', '1\.\.4'.*'2.weight' \(2 in all\).*disjoint"),
        ([{"stages": ["0", "2"]}, {"stages": ["4"]}], "", r"3\.0\.weight, 3\.0\.bias.*\['3'\]"),
        ([{"stages": ["0", "2"]}], "", r"leave 4 .*\['3', '4'\].*freeze"),
        *(
            ([{"stages": ["0"], "name": name}, REST], "", f"'{name}': is a reserved name.*another `name`")
            for name in ("clean", "total", "forward_equivalents", "lowest", "deepest")
        ),
    ],
)
def test_settings_that_are_refused(specs, setting, problem, tokens_net):
    with pytest.raises(SettingError, match=problem) as error:
        resolved(tokens_net, *specs)
    assert error.value.setting == f"model.strategy.sites{setting}"


def test_two_sets_of_layers_of_the_same_stages_need_names(tokens_net):
    specs = [
        {"stages": ["0", "4"], "kind": "linear", "together": True, "modules": modules}
        for modules in (["0", "2"], ["3*", "4"])
    ]
    with pytest.raises(SettingError, match=r"'0\.\.4': is the name of two sites"):
        resolved(tokens_net, *specs)
    specs[1]["name"] = "upper"
    assert [site.name for site in resolved(tokens_net, *specs)] == ["0..4", "upper"]


def test_linear_sites_alone_do_not_teach_the_position_embedding():
    with pytest.raises(SettingError, match=r"leave 2 .*cls_token, pos_embed.*freeze"):
        resolved(tiny_vit(), {"stages": ["embed", "head"], "kind": "linear"})


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_parameters_belong_to_no_site(kind, tokens_net):
    freeze(tokens_net, "2.weight", "2.bias", "3.0.weight")
    specs = [{"stages": ["0", "3"], "kind": kind}, {"stages": ["4"], "kind": kind}]
    owned = {name for site in resolved(tokens_net, *specs) for name in site.parameters}
    assert owned == {"0.weight", "0.bias", "3.0.bias", "4.weight", "4.bias"}


def test_weights_tied_within_a_stage_cannot_be_taught_layer_by_layer():
    """The closed form at one of the layers would miss what the other contributes."""
    net = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)), nn.Linear(3, 2))
    net[0][2].weight = net[0][0].weight
    (block, _) = resolved(net, {"stages": ["0"], "kind": "block"}, {"stages": ["1"]})
    assert set(block.parameters) == {"0.0.weight", "0.0.bias", "0.2.bias"}
    for together in (False, True):
        with pytest.raises(SettingError, match="tied"):
            resolved(net, {"stages": ["0", "1"], "kind": "linear", "together": together})


def test_the_default_of_a_sequential_is_three_groups_and_a_head():
    net = nn.Sequential(*(nn.Linear(2, 2) for _ in range(7)))
    sites = resolved(net)
    assert [(site.name, site.first, site.last) for site in sites] == [
        ("group1", 0, 1), ("group2", 2, 3), ("group3", 4, 5), ("head", 6, 6),
    ]  # fmt: skip
    assert [len(site.parameters) for site in sites] == [4, 4, 4, 2]


def test_the_remedy_for_a_layer_without_closed_form_works():
    net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.GroupNorm(2, 4)), nn.Linear(4, 2))
    with pytest.raises(SettingError, match=r"take the stages \['1'\] out of it and train them with kind: block"):
        resolved(net, {"stages": ["0", "2"], "kind": "linear"})
    sites = resolved(
        net,
        {"stages": ["0"], "kind": "linear"}, {"stages": ["1"], "kind": "block"}, {"stages": ["2"], "kind": "linear"},
    )  # fmt: skip
    assert [len(site.parameters) for site in sites] == [2, 4, 2]


@pytest.mark.parametrize("site", [{"stages": ["0"], "sigmoid": 1.0}, "blocks.0", 3])
def test_what_is_no_site_is_refused(site):
    with pytest.raises(SettingError, match=r"model.strategy.sites\[0\]"):
        LikelihoodRatio(sites=[site])
