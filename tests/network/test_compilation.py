"""Compiled suffixes compute what the plain ones do, in one compilation for all equal blocks; hooks stay out of them."""

import shutil

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from flops_lightning.errors import SettingError
from flops_lightning.network import compilation
from flops_lightning.network.compilation import CompiledNetwork, check_compiler
from flops_lightning.network.staging import stage_network
from flops_lightning.strategies import SPSA, EvolutionStrategies, LikelihoodRatio
from tests.reference.networks import tiny_vit

GROUPS = [
    {"name": "lower", "stages": ["embed", "blocks.0"], "sigma": 0.05, "queries_per_sample": 4},
    {"name": "upper", "stages": ["blocks.1", "blocks.2"], "sigma": 0.05, "queries_per_sample": 4},
    {"name": "head", "stages": ["pool", "head"], "sigma": 0.05, "queries_per_sample": 4},
]


class Compiler:
    """Stands in for the compiler: runs what it is given, and counts."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


@pytest.fixture
def compiler(monkeypatch):
    """Dynamo traces for real; what it finds is run as it is, since a C++ compiler takes half a minute."""
    torch.compiler.reset()
    counting = Compiler()
    real = torch.compile
    monkeypatch.setattr(
        compilation.torch, "compile", lambda module, **options: real(module, backend=counting, **options)
    )
    yield counting
    torch.compiler.reset()


def row_loss(outputs, targets):
    return cross_entropy(outputs, targets, reduction="none")


def gradients(make, module, inputs, targets):
    network = stage_network(module)
    strategy = make()
    strategy.bind(network, row_loss)
    module.zero_grad()
    strategy.estimate(strategy.clean_pass(inputs, targets))
    return {name: p.grad.clone() for name, p in module.named_parameters()}, strategy


@pytest.mark.parametrize(
    "make",
    [
        lambda on: LikelihoodRatio(sites=GROUPS, chunk_rows=4, seed=0, compile_suffixes=on),
        lambda on: SPSA(sites=GROUPS, layout="factored", chunk_rows=4, seed=0, compile_suffixes=on),
        lambda on: EvolutionStrategies(sites=GROUPS, layout="shared", chunk_rows=4, seed=0, compile_suffixes=on),
    ],
    ids=["likelihood ratio", "factored", "shared"],
)
def test_the_estimate_is_that_of_plain_suffixes(make, compiler):
    torch.manual_seed(0)
    module = tiny_vit()
    inputs, targets = torch.randn(4, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    plain, _ = gradients(lambda: make(False), module, inputs, targets)
    assert compiler.graphs == 0
    compiled, _ = gradients(lambda: make(True), module, inputs, targets)
    assert compiler.graphs > 0
    torch.testing.assert_close(compiled, plain, rtol=1e-9, atol=1e-12)


def test_equal_blocks_are_compiled_once_and_follow_their_weights(compiler):
    torch.manual_seed(0)
    module = tiny_vit(depth=5)
    network = stage_network(module)
    compiled = CompiledNetwork(network)
    h = torch.randn(3, 5, 16, dtype=torch.float64)
    with torch.no_grad(), network.evaluating():
        for start in (1, 2, 3):
            torch.testing.assert_close(compiled.run_suffix(h, start), network.run(h, start))
        assert compiler.graphs == 1  # four whole blocks; the last one, the pool and the head run as they are
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        torch.testing.assert_close(compiled.run_suffix(h, 1), network.run(h, 1))
        assert compiler.graphs == 1


def test_layers_in_a_row_are_compiled_as_one(compiler):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 4))
    network = stage_network(module)
    network.live = lambda targets, tokens, start: torch.ones(5, tokens)
    compiled = CompiledNetwork(network)
    assert compiled.live is network.live
    with torch.no_grad():
        h = network.run(torch.randn(5, 6), 0, 1)
        torch.testing.assert_close(compiled.run_suffix(h, 1), network.run(h, 1))
        assert compiler.graphs == 1
        assert compiled.run_suffix(h, len(network)) is h
    assert set(module.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias", "3.weight", "3.bias"}


def test_a_setting_without_effect_is_refused():
    network = stage_network(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)))
    strategy = LikelihoodRatio(sites=[{"stages": ["0", "2"], "kind": "linear"}], compile_suffixes=True)
    with pytest.raises(SettingError, match=r"strategy\.compile_suffixes.*hooks.*kind: block or group"):
        strategy.bind(network, row_loss)
    whole = SPSA(sites=[{"stages": ["0", "2"], "name": "network"}], compile_suffixes=True)
    with pytest.raises(SettingError, match=r"strategy\.compile_suffixes.*has no effect"):
        whole.bind(network, row_loss)


def test_a_block_that_was_replaced_is_the_one_that_runs(compiler):
    module = tiny_vit(depth=5)
    network = stage_network(module)
    compiled = CompiledNetwork(network)
    h = torch.randn(3, 5, 16, dtype=torch.float64)
    with torch.no_grad(), network.evaluating():
        before = compiled.run_suffix(h, 1)
        module.blocks[1] = tiny_vit(depth=5).blocks[3].eval()
        after = compiled.run_suffix(h, 1)
        torch.testing.assert_close(after, network.run(h, 1))
    assert not torch.allclose(before, after)


def test_many_shapes_stay_compiled(compiler):
    if not compilation.LIMIT:
        pytest.skip("this torch gives up after eight shapes")
    network = stage_network(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)))
    compiled = CompiledNetwork(network)
    with torch.no_grad():
        for rows in range(2, 14):
            compiled.run_suffix(torch.randn(rows, 8), 1)
    assert compiler.graphs == 12


def test_a_missing_compiler_is_found_out_at_once(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(SettingError, match=r"a C\+\+ compiler.*compile_suffixes: false"):
        check_compiler(torch.device("cpu"))
    monkeypatch.setattr(compilation.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingError, match="triton"):
        check_compiler(torch.device("cuda"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_the_real_compiler_agrees():
    torch.compiler.reset()
    torch.manual_seed(0)
    module = tiny_vit().float()
    inputs, targets = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    found = [
        gradients(lambda on=on: LikelihoodRatio(sites=GROUPS, seed=0, compile_suffixes=on), module, inputs, targets)[0]
        for on in (False, True)
    ]
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)
