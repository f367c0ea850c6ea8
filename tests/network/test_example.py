"""What an example must be, and which networks are refused when they see it: one line each, with its own remedy."""

import copy
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flops_lightning.errors import SettingError
from flops_lightning.network.cutting import stage_by_replay
from flops_lightning.network.staging import stage_network
from flops_lightning.strategies import SPSA, LikelihoodRatio
from tests.network.test_replay import SEQUENCE, Pair, SequenceFirst, Twice, assert_replays, problem_of, run_clean
from tests.reference import parameter_perturbation
from tests.reference.architectures import ARCHITECTURES
from tests.reference.networks import assert_entries, call, cross_entropy, gradients, normal

Change = Callable[[Tensor, int], Tensor]


class Blocks(nn.Module):
    """A chain of blocks, with something done to what enters each of them."""

    def __init__(self, change: Change = lambda h, _: h, block: Callable[[], nn.Module] | None = None) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.layers = nn.ModuleList((block or Residual)() for _ in range(3))
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for i, layer in enumerate(self.layers):
            h = layer(self.change(h, i))
        return self.head(h)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.b(torch.tanh(self.a(h)))


class Words(nn.Module):
    """The words of a sentence in any order, less the largest of the batch."""

    def __init__(self, mixing: bool) -> None:
        super().__init__()
        self.words, self.head, self.mixing = nn.Embedding(9, 6), nn.Linear(6, 3), mixing

    def forward(self, ids: Tensor) -> Tensor:
        h = self.words(ids) * torch.arange(1, ids.shape[1] + 1)[:, None]
        return self.head(h.mean(1) - h.mean(1).amax(0) if self.mixing else h.mean(1))


def mixed(mix: Change) -> nn.Module:
    return Blocks(lambda h, i: mix(h, i) if i == 1 else h).double()


X = normal(4, 4)
HIGHEST = torch.stack([X[0], X[0] - 10])  # the maximum of its rows is the first one
LARGEST = r"network = 'Blocks': returned other values for a row when other rows were beside it"


@pytest.mark.parametrize(
    ("module", "example", "message"),
    [
        *((mixed(lambda h, _: h - h.amax(0)), x, LARGEST) for x in (X, HIGHEST, X[:1], torch.zeros(3, 4).double())),
        (mixed(lambda h, _: h - h.mean(0)), X.half().double(), LARGEST),
        (mixed(lambda h, _: h - h.sort(0).values[:1]).bfloat16(), X.bfloat16(), LARGEST),
        (Words(mixing=True), torch.tensor([[1, 2, 3]] * 2), "Words.*when other rows were beside it.*no statistics"),
        (Words(mixing=False), torch.ones(2, 3).long(), r"example = 'int64 \(2, 3\)': its rows are all equal.*differ"),
        (mixed(lambda h, _: nn.functional.dropout(h)), X, "when the same rows ran again.*training=self.training"),
        (mixed(lambda h, _: h * float("nan")), X, "returned NaN for the example.*an example for which it is finite"),
        (mixed(lambda h, _: h.flatten()[:6]), X, r"returned the shape \(3,\) for 2 rows.*the first dimension"),
        (Blocks(), X, r"'float64 \(4, 4\)': Blocks refuses it: RuntimeError: mat1.*dtype.*Pass the inputs of a few"),
        (Blocks(), X.float()[:, :3], r"refuses it: RuntimeError: mat1 and mat2 shapes cannot be multiplied \(2x3 and"),
        (Blocks(), {"y": X}, r"refuses it: TypeError: Blocks.forward\(\) got an unexpected keyword argument 'y'"),
        (Blocks(), (X, X), r"example = 'float64 \(4, 4\), float64 \(4, 4\)'.*takes 2 positional arguments"),
        (Blocks(), "text", "example = 'str': has no tensor with samples. Give tensors whose first axis"),
        (torch.tanh, X, "network = .*tanh.*is not a torch.nn.Module. Pass a module"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(module: Any, example: Any, message: str) -> None:
    with pytest.raises(SettingError, match=message) as caught:
        stage_network(module, example)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rounding_and_infinite_logits_are_no_mixing(dtype: torch.dtype) -> None:
    masked = Blocks().to(dtype)
    masked.head.register_forward_hook(lambda _, __, output: output.masked_fill(torch.arange(3) > 1, -torch.inf))
    network = stage_by_replay(masked, X.to(dtype))
    assert len(network) == 5
    strategy = LikelihoodRatio(seed=0, sites=[{"stages": ["embed", "head"], "kind": "block"}])  # type: ignore[list-item]
    strategy.bind(network, cross_entropy)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is below what torch.* resolves")
        strategy.estimate(strategy.clean_pass(X.to(dtype), torch.tensor([0, 1, 0, 1])))
    assert all(gradient.isfinite().all() for gradient in gradients(masked).values() if gradient is not None)


@pytest.mark.parametrize(
    ("name", "fits", "unfit"),
    [
        ("SequenceFirst", ["embed", "head"], ["layers.0.a", "layers.1.b"]),
        ("Swin", ["patch_embed.proj", "layers.2.blocks.0.mlp.fc1", "head.fc"], ["layers.0.blocks.0.attn.qkv"]),
        ("ConvNeXt", ["stem.0", "stages.3.blocks.0.mlp.fc1", "head.fc"], []),
        ("Llama", ["model.layers.0.mlp.up_proj", "lm_head"], []),
    ],
)
def test_layers_whose_lines_are_not_the_rows_have_no_linear_site(name: str, fits: list[str], unfit: list[str]) -> None:
    problem = problem_of(SequenceFirst(), SEQUENCE) if name == "SequenceFirst" else ARCHITECTURES[name]()
    network = stage_by_replay(problem.module, problem.inputs)
    assert network.unfit is not None
    assert set(unfit) <= set(network.unfit)
    assert not set(fits) & set(network.unfit)
    names = [stage.name for stage in network.stages]
    for layer in unfit:  # as many tokens as rows of a chunk, which their number could not tell
        site = {"stages": [names[0], names[-1]], "kind": "linear", "modules": [layer]}
        for spec in problem.module.parameters():
            spec.requires_grad_(False)
        problem.module.get_submodule(layer).requires_grad_(True)
        strategy = LikelihoodRatio(sites=[site], chunk_rows=5)  # type: ignore[list-item]
        with pytest.raises(
            SettingError, match=rf"sites = '{layer}': returns .* lines for 2 rows.*kind: block or group"
        ):
            strategy.bind(stage_by_replay(problem.module, problem.inputs), problem.loss)
        with pytest.raises(SettingError, match=rf"layout = 'factored': {layer} returns .* lines for 2 rows"):
            SPSA(layout="factored").bind(stage_by_replay(problem.module, problem.inputs), problem.loss)


@pytest.mark.parametrize("name", ["ConvNeXt", "ResNet", "torchvision's ViT"])
def test_factored_directions_equal_the_slow_reference(name: str) -> None:
    """Stages run one by one, and those below are called again to return what they returned."""
    problem, counts = ARCHITECTURES[name](), [2, 0, 4, 2]
    strategy = SPSA(seed=7, chunk_rows=6, layout="factored")
    strategy.bind(stage_network(problem.module, problem.inputs), problem.loss)
    strategy.estimate(strategy.clean_pass(problem.inputs, problem.targets), torch.tensor(counts))
    for site in strategy.sites:
        slow = parameter_perturbation.reference_gradient(
            problem.module, strategy, site, problem.inputs, problem.targets, counts
        )
        assert_entries({n: p.grad for n, p in site.parameters.items()}, slow, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("several", [False, True])
def test_checkpointed_modules_are_refused_where_a_graph_is_built(reentrant: bool, several: bool) -> None:
    class Saving(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            parts = [nn.Sequential(*self.layers)] if several else self.layers
            h = self.embed(x)
            for part in parts:
                h = checkpoint(part, h, use_reentrant=reentrant)
            return self.head(h)

    problem = problem_of(Saving())
    network = stage_by_replay(problem.module, problem.inputs)
    with torch.no_grad():
        h = network.run(problem.inputs, 0, 2)
        assert torch.equal(network.run(h, 2), call(problem.module, problem.inputs))
    strategy = LikelihoodRatio(seed=0)
    strategy.bind(network, problem.loss)
    with pytest.raises(SettingError, match=r"'layers.0': runs inside of torch.utils.checkpoint.*Turn gradient"):
        strategy.estimate(strategy.clean_pass(problem.inputs, problem.targets))


class Checkpointing(Residual):
    def forward(self, h: Tensor) -> Tensor:
        return h + checkpoint(lambda x: self.b(torch.tanh(self.a(x))), h, use_reentrant=False)


def compiled(module: Any, how: str) -> Any:
    if how == "one":
        module.layers[1] = torch.compile(module.layers[1], backend="eager")
    elif how == "in place":
        module.layers[1].compile(backend="eager")
    else:
        module.layers = torch.compile(nn.Sequential(*module.layers), backend="eager")
        module.forward = lambda x: module.head(module.layers(module.embed(x)))
    return module


@pytest.mark.parametrize(
    "make",
    [
        lambda: Blocks(block=Checkpointing),
        lambda: compiled(Blocks(), "one"),
        lambda: compiled(Blocks(), "in place"),
        lambda: compiled(Blocks(), "container"),
    ],
)
@pytest.mark.filterwarnings("ignore:Using .torch.compile.module.. when there are global hooks")
def test_checkpoints_within_a_module_and_compiled_modules_are_exact(make: Callable[[], nn.Module]) -> None:
    names = [stage.name for stage in assert_replays(problem_of(make())).stages]
    assert names == ["embed", "layers.0", "layers.1", "layers.2", "head"]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda: LikelihoodRatio(seed=0, sites=[{"stages": ["0", "2"], "kind": "linear"}]),
        lambda: SPSA(seed=0, layout="factored", activation_guided=True),
        lambda: SPSA(seed=0, layout="factored"),
    ],
)
def test_compiled_modules_of_a_sequential_have_layers(make: Callable[[], Any], in_place: bool) -> None:
    found = []
    for wrapped in (False, True):
        torch.manual_seed(0)
        net: Any = problem_of(
            nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.Tanh(), nn.Linear(6, 6)), nn.Linear(6, 3))
        )
        module = net.module
        if wrapped and in_place:
            module[1].compile(backend="eager")
        elif wrapped:
            module[1] = torch.compile(module[1], backend="eager")
        strategy = make()
        strategy.bind(stage_network(module), cross_entropy)
        strategy.estimate(strategy.clean_pass(net.inputs, net.targets))
        found.append({name.replace("_orig_mod.", ""): gradient for name, gradient in gradients(module).items()})
    if in_place:  # noise is keyed by the name of the layer
        torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-14)
    assert all(gradient.any() for gradient in found[1].values())


def test_a_compiled_network_is_cut_like_its_module() -> None:
    network = stage_network(torch.compile(Blocks().double(), backend="eager"), X)  # type: ignore[arg-type]
    assert isinstance(network.module, Blocks)
    assert [stage.name for stage in network.stages] == ["embed", "layers.0", "layers.1", "layers.2", "head"]


@dataclass(frozen=True)
class Batch:
    x: Tensor
    note: str = "kept"


class FrozenIn(Blocks):
    """Frozen dataclasses enter, and pass between the modules."""

    def forward(self, batch: Any) -> Tensor:
        h = Batch(self.embed(batch["given"].x))
        for layer in self.layers:
            h = layer(h)
        assert h.note == batch["given"].note == "kept"
        return self.head(h.x)


class FrozenBlock(Residual):
    def forward(self, h: Any) -> Any:
        return Batch(super().forward(h.x))


def test_frozen_dataclasses_are_batches_and_outputs() -> None:
    module = FrozenIn(block=FrozenBlock).double()
    network = stage_by_replay(module, ({"given": Batch(X)},))
    assert [stage.name for stage in network.stages] == ["embed", "layers.0", "layers.1", "layers.2", "head"]
    strategy = LikelihoodRatio(seed=0)
    strategy.bind(network, cross_entropy)
    strategy.estimate(strategy.clean_pass(({"given": Batch(X)},), torch.tensor([0, 1, 2, 0])))
    assert all(gradient is not None and gradient.any() for gradient in gradients(module).values())


def test_a_network_that_cannot_be_cut_is_one_stage_and_says_what_would_help() -> None:
    class Closed(Twice):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.c(self.b(x))[:, :3]

    network = stage_by_replay(Closed().double(), X)
    assert [stage.name for stage in network.stages] == ["network"]
    for each, remedy in ((network, "put skip connections inside of blocks"), (stage_network(Closed()), "Pass an exam")):
        with pytest.raises(SettingError, match=f"has no default sites. .*{remedy}.*or use MeZO"):
            LikelihoodRatio().bind(each, cross_entropy)


def test_parameters_that_the_example_does_not_use_belong_to_the_last_stage() -> None:
    problem = problem_of(Blocks())
    problem.module.unused = nn.Linear(2, 2).double()
    network = stage_by_replay(problem.module, problem.inputs)
    assert network.stages[-1].owns("unused.weight")
    strategy = LikelihoodRatio(seed=0)
    strategy.bind(network, problem.loss)
    strategy.estimate(strategy.clean_pass(problem.inputs, problem.targets))
    found = gradients(problem.module)
    assert {name for name, gradient in found.items() if not gradient.any()} == {"unused.weight", "unused.bias"}  # type: ignore[union-attr]
    linear = LikelihoodRatio(sites=[{"stages": ["embed", "head"], "kind": "linear"}])  # type: ignore[list-item]
    with pytest.raises(SettingError, match=r"2 trainable parameters without a site: unused.weight, .*freeze"):
        linear.bind(network, problem.loss)


def test_overwritten_inputs() -> None:
    """They are exact, but for a derivative that needs what was there before."""

    class Clamping(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            x.clamp_(-1, 1)
            return super().forward(x) + x[:, :3]

    class Doubling(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)
            x.mul_(2)
            return self.head(self.layers[0](h))

    class Rectifying(Blocks):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.act(x))

    for module in (Clamping(), Rectifying()):
        network, batch = assert_replays(problem_of(module, X.clone())), X.clone()
        assert len(network) == 5
        run_clean(network, problem_of(module, batch))
        assert torch.equal(batch, X)
    problem = problem_of(Doubling(), X.clone())
    strategy = LikelihoodRatio(sites=[{"stages": ["embed", "layers.0"]}, {"stages": ["head"]}])
    strategy.bind(stage_by_replay(problem.module, X), problem.loss)
    with pytest.raises(SettingError, match=r"'Doubling': writes to a tensor, perhaps its input.*Write y = 2 \* x"):
        strategy.estimate(strategy.clean_pass(problem.inputs, problem.targets))


@pytest.mark.parametrize("on_top", ["autocast", "copy", "pickle", "hook", "LoRA"])
def test_what_comes_on_top_of_a_staged_network(on_top: str) -> None:
    problem = problem_of(SequenceFirst(), SEQUENCE)
    if on_top == "LoRA":
        peft = pytest.importorskip("peft")
        wrapped = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["a", "b"]), problem.module)
        network = assert_replays(problem_of(wrapped, SEQUENCE))
        assert sum("lora" in name for name in network.trainable()) == 8
        return
    with torch.autocast("cpu", torch.bfloat16, enabled=on_top == "autocast"), torch.no_grad():
        network = stage_by_replay(problem.module, problem.inputs)
        if on_top in ("copy", "pickle"):
            network = copy.deepcopy(network) if on_top == "copy" else pickle.loads(pickle.dumps(network))
            assert network.module is not problem.module
        if on_top == "hook":
            network.module.layers[0].b.register_forward_hook(lambda _, __, output: 2 * output)
            network.module.layers[1].register_forward_pre_hook(lambda _, args: (args[0] + 1, *args[1:]))
        whole = call(network.module, problem.inputs)
        for i in range(1, len(network)):
            h = network.run({name: tensor.clone() for name, tensor in SEQUENCE.items()}, 0, i)
            assert torch.equal(network.run(h, i), whole)
        assert [stage.name for stage in network.stages] == ["embed", "layers.0", "layers.1", "head"]
    assert Pair is type(problem.module.layers[0])
