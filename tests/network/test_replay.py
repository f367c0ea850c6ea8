import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flops_lightning.errors import SettingError
from flops_lightning.network.cutting import stage_by_replay
from flops_lightning.network.replay import ReplayedNetwork
from flops_lightning.network.rows import Rows, as_rows, value_of, with_value
from flops_lightning.network.staging import stage_network
from flops_lightning.queries import CleanPass, clean_pass, row_losses
from flops_lightning.strategies import SPSA, MeZO
from flops_lightning.strategies.site_specs import SiteSpec
from flops_lightning.strategies.sites import resolve_sites
from flops_lightning.strategies.vjp import local_vjp
from tests.reference.architectures import ARCHITECTURES, Problem, exact_gradient
from tests.reference.networks import call, cross_entropy, normal, shaken

GATHERED = torch.tensor([2, 0, 0, 3, 1])


def run_clean(network: ReplayedNetwork, problem: Problem) -> CleanPass:
    inputs = as_rows(problem.inputs)
    keep = range(len(network) + 1)
    clean = clean_pass(network, problem.loss, inputs, problem.targets, keep=keep, draw=0, rows=4)
    clean.activations.setdefault(0, inputs)
    return clean


def gathered(inputs: Any) -> Any:
    rows = as_rows(inputs).index_select(0, GATHERED)
    return rows.tree() if isinstance(rows, Rows) else rows


def assert_replays(problem: Problem) -> ReplayedNetwork:
    """From every boundary the output is that of the whole network, and gradients at the sites add up to autograd's."""
    network = stage_by_replay(problem.module, problem.inputs)
    clean = run_clean(network, problem)
    with torch.no_grad():
        whole, some = call(problem.module, problem.inputs), call(problem.module, gathered(problem.inputs))
        for i in range(1, len(network)):
            h = clean.activations[i]
            torch.testing.assert_close(network.run(h.clone(), i), whole, rtol=0, atol=0)
            torch.testing.assert_close(network.run(h.index_select(0, GATHERED), i), some, rtol=1e-12, atol=1e-14)
    # E z z^T = I, so a query at a site estimates J^T times the derivative in its output; here that derivative is exact.
    found: dict[str, Tensor] = {}
    names = [stage.name for stage in network.stages]
    for site in resolve_sites(network, [SiteSpec(stages=[names[0], names[-1]], kind="block")]):
        h = clean.activations[site.start]
        leaf = value_of(h).detach().requires_grad_()
        losses = row_losses(
            problem.loss, value_of(network.run(with_value(h, leaf.clone()), site.start)), problem.targets
        )
        (delta,) = torch.autograd.grad(losses.mean(), leaf)
        found |= local_vjp(network, site, clean, delta, rows=3)
    torch.testing.assert_close(found, exact_gradient(problem, network), rtol=1e-9, atol=1e-12)
    return network


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_any_architecture_is_replayed_exactly(name: str) -> None:
    network = assert_replays(ARCHITECTURES[name]())
    assert len(network) >= 5


class UNet(nn.Module):
    """Tensors pass beside the middle, so that no query can start within the skips."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down, self.middle = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 6)
        self.up, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        h = self.middle(torch.tanh(self.down(x)))
        return self.head(torch.tanh(self.up(h + x)))


class Writing(nn.Module):
    """Writes in place in glue and in modules, and returns the same tensor from a module without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.same = nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Identity()
        self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 3)
        self.offset = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.same(self.first(x))
        x += self.offset
        return self.third(torch.sin(self.second(self.act(x))))


class SequenceFirst(nn.Module):
    """Rows lie along the second axis inside, with a table that all share, and a tuple between the modules."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.table = nn.Linear(2, 6), Table()
        self.layers = nn.ModuleList(Pair() for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h, table = self.embed(x).transpose(0, 1), self.table(x)
        extra: Any = None
        for layer in self.layers:
            h, extra = layer(h * mask.mT[..., None] + table, extra)
        return self.head(h.mean(0))


class Table(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.arange(x.shape[1], dtype=x.dtype)[:, None, None] / 10


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, h: Tensor, extra: Any) -> tuple[Tensor, dict[str, int]]:
        return h + self.b(torch.tanh(self.a(h))), {"tokens": h.shape[0]}


class Remembering(nn.Module):
    """A module hands a tensor to another one without returning it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.a.register_forward_hook(lambda _, args, output: setattr(self, "kept", output * 2))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.b(self.a(x)))
        return self.d(torch.tanh(self.c(h)) + self.kept)


class Twice(nn.Module):
    """One module runs again after others."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.b(torch.tanh(self.a(x))))
        h = torch.tanh(self.a(h))
        return self.d(torch.tanh(self.c(h)))


class ClassToken(nn.Module):
    """Glue makes a tensor of a parameter before the first module ends, and reads it after."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.token = nn.Linear(4, 6), nn.Parameter(torch.ones(1, 6))
        self.layers, self.head = nn.ModuleList(Pair() for _ in range(2)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.stack([self.token.expand(len(x), -1), self.embed(x)], dim=1)
        for layer in self.layers:
            h, _ = layer(h, None)
        return self.head(h[:, 0])


class Hooked(nn.Module):
    """A hook on a module uses a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.ones(6))
        self.a.register_forward_hook(lambda _, args, output: output * self.scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


class Spectrum(nn.Module):
    """A complex tensor passes beside."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.c(torch.tanh(self.b(h)) + torch.fft.irfft(torch.fft.rfft(h), n=6))


class Branches(nn.Module):
    """A block of two branches, each of which looks like a block of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.paths = nn.ModuleList(Pair() for _ in range(2))

    def forward(self, h: Tensor) -> Tensor:
        return self.paths[0](h, None)[0] * self.paths[1](h, None)[0]


class Branched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.layers = nn.Sequential(*(Branches() for _ in range(6)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(x)))


class Sorting(nn.Module):
    """Rows are sorted inside."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        return self.c(self.b(torch.tanh(self.a(x[order])))[order.argsort()])


class Masked(nn.Module):
    """Glue reads a boolean mask, which may be missing."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(2, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.b(torch.tanh(self.a(x)))
        h = h if mask is None else h.masked_fill(mask[..., None], 0.0)
        return self.c(h.mean(1))


def problem_of(module: nn.Module, inputs: Any = None) -> Problem:
    return Problem(shaken(module), normal(4, 4) if inputs is None else inputs, torch.tensor([0, 1, 2, 0]))


SEQUENCE = {"x": normal(4, 5, 2), "mask": torch.ones(4, 5, dtype=torch.float64).index_fill(1, torch.tensor([4]), 0)}


@pytest.mark.parametrize(
    ("problem", "stages"),
    [
        (lambda: problem_of(UNet()), ["stem", "up", "head"]),
        (lambda: problem_of(Writing()), ["first", "second", "third"]),
        (lambda: problem_of(SequenceFirst(), SEQUENCE), ["embed", "layers.0", "layers.1", "head"]),
        (lambda: problem_of(SequenceFirst(), tuple(SEQUENCE.values())), ["embed", "layers.0", "layers.1", "head"]),
        (lambda: problem_of(Remembering()), ["a", "d"]),
        (lambda: problem_of(Twice()), ["c", "d"]),
        (lambda: problem_of(ClassToken()), ["embed", "layers.0", "layers.1", "head"]),
        (lambda: problem_of(Hooked()), ["a", "b", "c"]),
        (lambda: problem_of(Spectrum()), ["a", "c"]),
        (lambda: problem_of(Sorting()), ["network"]),
        (
            lambda: problem_of(Branched()),
            ["embed", *(f"layers.{i}" for i in range(6)), "head"],
        ),
        (lambda: problem_of(Masked(), {"x": normal(4, 5, 2), "mask": torch.eye(4, 5).bool()}), ["a", "b", "c"]),
    ],
)
def test_where_no_query_can_start_stages_are_one(problem: Callable[[], Problem], stages: list[str]) -> None:
    assert [stage.name for stage in assert_replays(problem()).stages] == stages


def test_networks_are_copied_and_pickled_with_their_stages() -> None:
    network = stage_by_replay(SequenceFirst().double(), SEQUENCE)
    h = network.run(Rows.of(SEQUENCE), 0, 2)
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert other.module is not network.module
        torch.testing.assert_close(other.run(h, 2), network.run(h, 2), rtol=0, atol=0)


def test_forwards_are_put_back_after_a_run_and_after_a_failure() -> None:
    problem = problem_of(SequenceFirst(), SEQUENCE)
    network = stage_by_replay(problem.module, SEQUENCE)
    h = network.run(Rows.of(SEQUENCE), 0, 2)
    handle = problem.module.head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        network.run(h, 2)
    handle.remove()
    assert not [name for name, module in problem.module.named_modules() if "forward" in vars(module)]


def test_rows_of_another_length_and_batches_of_one_are_replayed() -> None:
    problem = problem_of(SequenceFirst(), SEQUENCE)
    network = stage_by_replay(problem.module, {name: tensor[:1] for name, tensor in SEQUENCE.items()})
    longer = {"x": normal(3, 7, 2), "mask": torch.ones(3, 7, dtype=torch.float64)}
    h = network.run(Rows.of(longer), 0, 2)
    torch.testing.assert_close(network.run(h, 2), call(problem.module, longer), rtol=0, atol=0)


class WritingBeside(nn.Module):
    """Glue writes to a frozen tensor that passes beside, and to the inputs, which are read at the top."""

    def __init__(self) -> None:
        super().__init__()
        self.skip, self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.skip.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.skip(x)
        h = torch.tanh(self.a(x))
        skip += 1
        x *= 2
        return self.head(self.b(h) + skip + x)


def test_what_a_network_writes_to_stays_as_it_is_outside_of_queries_and_is_not_copied_in_them() -> None:
    problem = problem_of(WritingBeside())
    inputs = problem.inputs.clone()
    network = stage_by_replay(problem.module, inputs)
    assert [stage.name for stage in network.stages] == ["skip", "a", "b", "head"]
    kept: dict[int, Rows] = {}
    whole = network.visit(inputs, 0, (1, 2, 3), lambda i, h: kept.update({i: h.clone()}))
    torch.testing.assert_close(whole, call(problem.module, inputs.clone()), rtol=0, atol=0)
    assert torch.equal(inputs, problem.inputs)
    for i, h in kept.items():
        again: dict[int, Rows] = {i: h.clone()}
        assert torch.equal(network.run(again[i], i), whole)
        network.visit(again[i], i, range(i + 1, 4), lambda j, rows: again.update({j: rows.clone()}))  # noqa: B023
        for j, rows in again.items():
            assert all(torch.equal(tensor, kept[j].tensors[key]) for key, tensor in rows.tensors.items())
        spent = again[i].tensors["inputs", 0]
        assert torch.equal(network.run_suffix(again[i], i), whole)
        assert torch.equal(spent, 2 * problem.inputs)


class BatchMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(torch.tanh(h - h.mean(0)))


class Several(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return x, super().forward(x)


@pytest.mark.parametrize(
    ("module", "inputs", "message"),
    [
        (Several(4, 2), torch.randn(4, 4), r"'tuple'.*expected one tensor.*Wrap the network"),
        (nn.Linear(4, 2), {"x": torch.ones(3, 4), "y": torch.ones(2)}, r"\[2, 3\].*one length"),
        (nn.Linear(4, 2), {"x": "text"}, r"has no tensor"),
    ],
)
def test_networks_and_batches_that_cannot_be_replayed(module: nn.Module, inputs: Any, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        stage_by_replay(module, inputs)


def test_without_an_example_a_network_is_one_stage_which_mezo_trains() -> None:
    problem = problem_of(UNet())
    network = stage_network(problem.module)
    assert [stage.name for stage in network.stages] == ["network"]
    strategy = MeZO(queries=2000, sigma=1e-4, seed=0)
    strategy.bind(network, problem.loss)
    strategy.estimate(strategy.clean_pass(problem.inputs, problem.targets))
    exact, found = exact_gradient(problem, network), {n: p.grad for n, p in network.trainable().items()}
    flat, true = (torch.cat([g.flatten() for g in each.values()]) for each in (found, exact))
    # (z z^T g) . g / |g|^2 has the variance 2 a direction.
    assert abs(float(flat @ true / (true @ true)) - 1) < 4 * (2 / 1000) ** 0.5


def test_all_parameters_of_an_uncut_network_are_one_site() -> None:
    strategy = SPSA(seed=0)
    strategy.bind(stage_network(UNet().double()), cross_entropy)
    assert [(site.name, len(site.parameters)) for site in strategy.sites] == [("all", 10)]


def test_batches_unlike_the_example_are_refused() -> None:
    example = {"x": normal(4, 5, 2)}
    network = stage_by_replay(Masked().double(), example)
    torch.testing.assert_close(network.run(Rows.of({"mask": None, **example})), network.module(**example))
    with pytest.raises(SettingError, match=r"'mask': True.*has other entries than the example"):
        network.run(Rows.of({**example, "mask": torch.eye(4, 5).bool()}))
    looping = problem_of(Looping(), normal(4, 1, 4))
    network = stage_by_replay(looping.module, looping.inputs)
    with pytest.raises(
        SettingError, match=r"'cell'.*did not run exactly once and in the order in which it ran for the example"
    ):
        network.run(normal(4, 3, 4))


class Looping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x[:, 0]
        for _ in range(x.shape[1]):
            h = torch.tanh(self.cell(h))
        return self.head(h)


def test_parameters_thawed_after_the_cut_are_refused() -> None:
    problem = problem_of(UNet())
    problem.module.stem.requires_grad_(False)
    network = stage_by_replay(problem.module, problem.inputs)
    problem.module.stem.requires_grad_(True)
    with pytest.raises(SettingError, match=r"'stem.bias': was frozen when the network was cut.*Cut the network again"):
        network.trainable()
