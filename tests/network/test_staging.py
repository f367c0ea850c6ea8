import copy
import pickle
from collections import Counter
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import Block, ParallelScalingBlock, ParallelThingsBlock
from torch import Tensor, nn

from flops_lightning.errors import SettingError
from flops_lightning.network.operations import flops
from flops_lightning.network.staging import Stage, StagedNetwork, stage_network
from flops_lightning.strategies.sites import SiteSpec, resolve_sites
from tests.reference.networks import TokenMean, freeze, shaken, tiny_vit

VITS: dict[str, dict[str, Any]] = {
    "plain": {},
    "pre_norm": {"pre_norm": True},
    "registers": {"reg_tokens": 3},
    "registers without positions": {"reg_tokens": 2, "no_embed_class": True},
    "avg": {"global_pool": "avg"},
    "avg with registers": {"global_pool": "avg", "reg_tokens": 2},
    "avg with prefix": {"global_pool": "avg", "pool_include_prefix": True},
    "avg without class token": {"global_pool": "avg", "class_token": False},
    "max": {"global_pool": "max"},
    "avgmax": {"global_pool": "avgmax"},
    "map": {"global_pool": "map"},
    "map without class token": {"global_pool": "map", "class_token": False},
    "no pooling": {"global_pool": ""},
    "no position": {"pos_embed": "none"},
    "no final norm": {"final_norm": False},
    "fc_norm": {"fc_norm": True},
    "qk_norm and layer scale": {"qk_norm": True, "init_values": 0.5},
    "normed attention and mlp": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "drop": {"drop_rate": 0.3, "drop_path_rate": 0.3, "attn_drop_rate": 0.3, "patch_drop_rate": 0.3},
    "parallel scaling": {"block_fn": ParallelScalingBlock},
    "parallel things": {"block_fn": ParallelThingsBlock},
    "no classes": {"num_classes": 0},
    "one block": {"depth": 1},
}


@pytest.fixture(params=VITS)
def any_vit(request: pytest.FixtureRequest) -> nn.Module:
    return tiny_vit(**VITS[request.param]).eval()


@pytest.fixture
def x(images: tuple[Tensor, Tensor]) -> Tensor:
    return images[0]


def assert_prefixes_fit(module: nn.Module, x: Tensor) -> None:
    """Wherever the network is cut, the two parts give what the whole gives."""
    network = stage_network(module)
    whole = network.run(x)
    torch.testing.assert_close(whole, module(x), rtol=1e-12, atol=1e-14)  # products of other shapes round otherwise
    for i in range(len(network) + 1):
        torch.testing.assert_close(network.run(network.run(x, 0, i), i), whole, rtol=0, atol=0)


def test_the_stages_of_a_vit(any_vit, x):
    """Cut anywhere they give what the whole gives, and they depend on the tokens that they read and on no others."""
    assert_prefixes_fit(any_vit, x)
    network = stage_network(any_vit)
    last, pool = len(network) - 3, network.stages[-2]
    known = type(any_vit.blocks[-1]) is Block and isinstance(any_vit.blocks[-1].attn.norm, nn.Identity)
    entering, leaving = (network.run(x, 0, i) for i in (last, last + 1))
    if pool.narrows and known:  # of the last block only the tokens that are read are computed
        torch.testing.assert_close(leaving, any_vit.blocks[-1](entering)[:, :1], rtol=1e-12, atol=1e-14)
    else:
        assert leaving.shape[1] > 1
    for i, stage in enumerate(network.stages):
        if stage.reads is None:
            continue
        h = network.run(x, 0, i)
        clean = stage.run(h)
        if stage.narrows:
            torch.testing.assert_close(network.run(h[:, stage.reads], i), network.run(h, i), rtol=1e-13, atol=1e-13)
        others = h.clone()
        others[:, stage.reads] = 0.0
        torch.testing.assert_close(stage.run(h + others), clean, rtol=0, atol=0)
        for t in range(h.shape[1])[stage.reads]:
            moved = h.clone()
            moved[:, t] += torch.linspace(1, 2, h.shape[2], dtype=h.dtype)
            assert not torch.equal(stage.run(moved), clean), f"token {t} is said to be read and is not"


@pytest.mark.parametrize("option", [{"scale_attn_norm": True}, {"qk_norm": True, "init_values": 0.1}])
@pytest.mark.parametrize("fused", [True, False])
def test_the_last_block_of_other_kinds_gives_what_timm_gives(option, fused, x):
    vit = shaken(tiny_vit(**option)).eval()
    for block in vit.blocks:
        block.attn.fused_attn = fused
    torch.testing.assert_close(stage_network(vit).run(x), vit(x), rtol=1e-12, atol=1e-14)


def test_prefix_and_suffix_of_other_networks(tokens_net, tokens):
    """Another image size, a sequential, and a module that is used twice."""
    assert_prefixes_fit(tiny_vit(dynamic_img_size=True).eval(), torch.randn(2, 1, 12, 16, dtype=torch.float64))
    assert_prefixes_fit(tokens_net, tokens[0])
    act = nn.SiLU()
    assert_prefixes_fit(shaken(nn.Sequential(nn.Linear(3, 4), act, nn.Linear(4, 4), act, nn.Linear(4, 2))), tokens[0])


def test_the_class_token_alone_is_read_where_it_is_the_pooled_one():
    reads = {name: stage_network(tiny_vit(**kwargs)).stages[-2].reads for name, kwargs in VITS.items()}
    assert reads["plain"] == reads["registers"] == slice(0, 1)
    assert reads["avg"] == slice(1, None)
    assert reads["avg with registers"] == slice(3, None)
    assert reads["avg with prefix"] is reads["map"] is reads["no pooling"] is None


def test_tokenwise_modules_reach_their_own_token_only(any_vit, x):
    network = stage_network(any_vit)
    for i, stage in enumerate(network.stages):
        h = network.run(x, 0, i)
        clean = stage.run(h)
        token = 0 if min(clean[0].numel(), h[0].numel()) == any_vit.embed_dim else 2  # one token alone is read
        for name in stage.tokenwise:

            def move(_: nn.Module, __: Any, output: Tensor, token: int = token) -> Tensor:
                output = output.clone()
                output[:, token] += 1.0
                return output

            handle = any_vit.get_submodule(name).register_forward_hook(move)
            changed = stage.run(h) != clean
            handle.remove()
            if stage.reads is None:
                assert changed.flatten(2).any(2).any(0).nonzero().flatten().tolist() == [token], name
            else:  # the stage pools: the token is read, or it changes nothing
                read = token in range(*stage.reads.indices(h.shape[1]))
                assert bool(changed.any()) <= read, name


def meta_vit(name: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name)


def owners(network: StagedNetwork, specs: list[SiteSpec]) -> Counter[str]:
    return Counter(name for site in resolve_sites(network, specs) for name in site.parameters)


WHOLE = ["embed", "head"]


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "vit_large_patch16_224"])
@pytest.mark.parametrize(
    ("specs", "frozen"),
    [
        ([], []),
        ([SiteSpec(WHOLE, kind="block")], []),
        ([SiteSpec(WHOLE, kind="linear")], ["cls_token", "pos_embed"]),
        ([SiteSpec(WHOLE, kind="linear", together=True)], ["cls_token", "pos_embed"]),
        ([SiteSpec(["embed"]), SiteSpec(["blocks.0", "blocks.11"], kind="linear")], "after blocks.11"),
    ],
    ids=["default", "block", "linear", "together", "mixed"],
)
def test_every_tensor_of_a_big_vit_has_one_owner(name, specs, frozen):
    vit = meta_vit(name)
    network = stage_network(vit)
    if isinstance(frozen, str):
        after = network.index[frozen.removeprefix("after ")]
        frozen = [n for n, _ in vit.named_parameters() if any(s.owns(n) for s in network.stages[after + 1 :])]
    freeze(vit, *frozen)
    expected = {n for n, _ in vit.named_parameters()} - set(frozen)
    assert len(expected) + len(frozen) == {"vit_base_patch16_224": 152, "vit_large_patch16_224": 296}[name]
    found = owners(network, specs)
    assert set(found) == expected
    assert set(found.values()) == {1}
    assert set(network.frozen()) == set(frozen)


def test_the_paper_s_layout_of_vit_base():
    """Appendix C.1: three groups of four blocks, and the head."""
    sites = resolve_sites(stage_network(meta_vit("vit_base_patch16_224")), [])
    network = stage_network(meta_vit("vit_base_patch16_224"))
    ends = [(site.name, network.stages[site.first].name, network.stages[site.last].name) for site in sites]
    assert ends == [
        ("group1", "embed", "blocks.3"),
        ("group2", "blocks.4", "blocks.7"),
        ("group3", "blocks.8", "blocks.11"),
        ("head", "pool", "head"),
    ]
    assert [site.tokens for site in sites] == [None, None, slice(0, 1), None]


@pytest.mark.parametrize("depth", range(1, 8))
def test_the_default_layout_owns_everything_at_any_depth(depth):
    vit = tiny_vit(depth=depth)
    found = owners(stage_network(vit), [])
    assert found == Counter({name: 1 for name, _ in vit.named_parameters()})


def test_staging_leaves_the_network_as_it_is(vit):
    attributes = {name: set(vars(module)) for name, module in vit.named_modules()}
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in vit.state_dict().items()}
    network = stage_network(vit)
    after = vit.state_dict()
    assert network.module is vit
    assert {id(p) for p in network.trainable().values()} == {id(p) for p in vit.parameters()}
    assert list(after) == list(before)
    for name, (pointer, value) in before.items():
        assert after[name].data_ptr() == pointer
        torch.testing.assert_close(after[name], value, rtol=0, atol=0)
    assert {name: set(vars(module)) for name, module in vit.named_modules()} == attributes


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))])
@pytest.mark.parametrize("build", [tiny_vit, lambda: shaken(nn.Sequential(nn.Flatten(), nn.Linear(64, 5)))])
def test_the_stages_of_a_copy_are_those_of_the_copied_network(duplicate, build, x):
    network = stage_network(build().eval())
    before = network.run(x)
    twin = duplicate(network)
    torch.testing.assert_close(twin.run(x), before, rtol=0, atol=0)
    with torch.no_grad():
        for parameter in twin.module.parameters():
            parameter.mul_(1.5)
    torch.testing.assert_close(twin.run(x), twin.module(x), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(network.run(x), before, rtol=0, atol=0)
    assert not torch.allclose(twin.run(x), before)


def test_weights_tied_within_a_stage_are_not():
    net = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), TokenMean())
    net[0][1].weight = net[0][0].weight
    assert set(stage_network(net).trainable()) == {"0.0.weight", "0.0.bias", "0.1.bias"}


class Doubled(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def tied(*, twice: bool) -> nn.Sequential:
    """Two layers that share their weight, or one that is used twice."""
    first, last = nn.Linear(3, 3), nn.Linear(3, 3)
    last.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), first if twice else last)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        *(
            (
                lambda norm=norm: nn.Sequential(nn.Linear(3, 3), nn.Sequential(norm(3))),
                r"1\.0: .*batch normalisation.*GroupNorm",
            )
            for norm in (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm, timm.layers.BatchNormAct2d)
        ),
        (lambda: meta_vit("resnet18"), r"bn1: BatchNorm2d.*Write batch_norm: frozen"),
        *((lambda twice=twice: tied(twice=twice), r"tied across \['0', '2'\].*untie") for twice in (False, True)),
        (lambda: nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2)), r"lazy.*forward pass"),
    ],
)
def test_networks_that_are_refused(build, message):
    with pytest.raises(SettingError, match=message):
        stage_network(build())


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_without_an_example_other_networks_are_a_single_stage(name):
    network = stage_network(meta_vit(name))
    assert [stage.name for stage in network.stages] == ["network"]
    assert network.parameters_of(0, 0).keys() == dict(network.module.named_parameters()).keys()


def test_a_sequential_that_computes_something_else_is_not_cut_into_its_children():
    net, x = Doubled(nn.Linear(3, 3), nn.Linear(3, 2)), torch.ones(4, 3)
    for network in (stage_network(net), stage_network(net, x)):
        torch.testing.assert_close(network.run(x), net(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("members", "owned"),
    [([("0",), ("0", "1")], r"\['a', 'b'\]"), ([("0",), ()], r"\[\]"), ([("0",), ("1.w",)], r"\[\]")],
)
def test_stages_made_by_hand_must_own_every_parameter_once(members, owned):
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    stages = tuple(Stage(name, net[i], members[i]) for i, name in enumerate("ab"))
    with pytest.raises(SettingError, match=f"belongs to the stages {owned}"):
        StagedNetwork(net, stages)


def test_attention_on_the_fast_path_of_torch_is_counted():
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval().requires_grad_(False)
    with torch.no_grad():
        counted, _ = flops(lambda x: attention(x, x, x, need_weights=False)[0], torch.randn(1, 5, 8))
    assert counted == 2 * 5 * 8 * (24 + 8) + 2 * 2 * 5 * 5 * 8  # four projections; scores and their sums
    assert torch.backends.mha.get_fastpath_enabled()
