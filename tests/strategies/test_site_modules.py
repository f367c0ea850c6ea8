"""Sites named by modules: the stages that these are, in any network, and why others are none."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flops_lightning.errors import SettingError
from flops_lightning.network.staging import stage_network
from flops_lightning.strategies import SPSA, LikelihoodRatio
from flops_lightning.strategies.site_specs import SiteSpec
from flops_lightning.strategies.site_stages import named_stages
from flops_lightning.strategies.sites import resolve_sites
from tests.network.test_example import Residual
from tests.network.test_replay import Remembering, Twice, UNet, problem_of
from tests.reference.architectures import Problem, exact_gradient
from tests.reference.networks import cross_entropy, gradients, normal, tiny_vit

Specs = list[dict[str, Any]]


def vit_problem() -> Problem:
    torch.manual_seed(0)
    return Problem(tiny_vit(), normal(4, 1, 8, 8), torch.tensor([0, 1, 2, 0]))


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.layers = nn.Sequential(*(Residual() for _ in range(6)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(x)))


def tower() -> Problem:
    return problem_of(Tower())


def sequential() -> Problem:
    torch.manual_seed(0)
    blocks = (nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3))
    return problem_of(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), *blocks, nn.Linear(6, 3)))


class Interleaved(nn.Module):
    """Convolutions and norms in lists of their own, run in turn."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(3))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = norm(layer(x))
        return self.head(x)


def test_a_container_stands_for_its_own_stages_and_not_for_those_between_them() -> None:
    problem = problem_of(Interleaved())
    network = stage_network(problem.module, problem.inputs)
    specs = [SiteSpec(modules=["layers"], kind="block"), SiteSpec(modules=["norms"], kind="block"),
             SiteSpec(modules=["head"])]  # fmt: skip
    sites = resolve_sites(network, specs)
    assert {site.name for site in sites} == {*(f"{kind}.{i}" for kind in ("layers", "norms") for i in range(3)), "head"}
    for modules, message in (
        (["layers"], r"leaves out \['norms.0', 'norms.1'\]"), (["norms", "layers"], "runs backwards"),
    ):  # fmt: skip
        with pytest.raises(SettingError, match=message):
            named_stages(network, SiteSpec(modules=modules), "sites[0]")


def test_the_default_of_earlier_versions_beside_stages_is_no_name_of_modules() -> None:
    network = stage_network(tower().module, tower().inputs)
    assert named_stages(network, SiteSpec(stages=["head"], modules=["*"]), "sites[0]") == [len(network) - 1]
    assert named_stages(network, SiteSpec(kind="linear"), "sites[0]") == list(range(len(network)))


BODY = {"stages": ["layers.0", "layers.5"]}


@pytest.mark.parametrize("strategy", [LikelihoodRatio, SPSA])
@pytest.mark.parametrize(
    ("make", "by_modules", "by_stages"),
    [
        (vit_problem, [{"modules": ["blocks.1", "blocks.2"]}], [{"stages": ["blocks.1", "blocks.2"]}]),
        (vit_problem, [{"modules": ["blocks.[12]"]}], [{"stages": ["blocks.1", "blocks.2"]}]),
        (
            vit_problem,
            [{"modules": ["blocks.*"], "kind": "block"}],
            [{"stages": ["blocks.0", "blocks.2"], "kind": "block"}],
        ),
        (vit_problem, [{"modules": ["*"], "kind": "block"}], [{"stages": ["embed", "head"], "kind": "block"}]),
        (vit_problem, [{"modules": ["embed", "blocks.[01]"]}], [{"stages": ["embed", "blocks.1"]}]),
        (tower, [{"modules": ["layer?"], "name": "x"}], [{**BODY, "name": "x"}]),
        (tower, [{"modules": ["layers.3"]}], [{"stages": ["layers.3"]}]),
        (tower, [{"modules": ["layers.1", "layers.4"]}], [{"stages": ["layers.1", "layers.4"]}]),
        (tower, [{"modules": ["layers"], "name": "x"}], [{**BODY, "name": "x"}]),
        (
            tower,
            [{"modules": ["layers.?", "head"], "kind": "block"}],
            [{"stages": ["layers.0", "head"], "kind": "block"}],
        ),
        (
            tower,
            [{"modules": ["layers.[024]"], "kind": "block"}],
            [{"stages": [f"layers.{i}"], "kind": "block"} for i in (0, 2, 4)],
        ),
        (sequential, [{"modules": ["0", "3"]}], [{"stages": ["0", "3"]}]),
        (sequential, [{"modules": ["[24]*"], "kind": "block"}], [{"stages": [i]} for i in "24"]),
    ],
)
def test_a_site_by_modules_is_that_by_stages(
    strategy: type[Any], make: Callable[[], Problem], by_modules: Specs, by_stages: Specs
) -> None:
    found = []
    for specs in (by_modules, by_stages):
        problem = make()
        network = stage_network(problem.module, problem.inputs)
        named = {i for spec in by_stages for i in named_stages(network, SiteSpec(**spec), "sites")}
        rest = [
            {"stages": [s.name]} for i, s in enumerate(network.stages) if i not in named and network.parameters_of(i, i)
        ]
        chosen = strategy(sites=[SiteSpec(**spec, queries_per_sample=2) for spec in (*specs, *rest)], seed=3)
        chosen.bind(network, cross_entropy)
        chosen.estimate(chosen.clean_pass(problem.inputs, problem.targets))
        found.append(({site.name for site in chosen.sites}, gradients(problem.module)))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=0)
    assert all(gradient is not None and gradient.isfinite().all() for gradient in found[0][1].values())


def test_estimates_at_modules_are_unbiased() -> None:
    """The slope of each estimate on autograd's gradient is 1 on average; E z z^T = I."""
    problem = tower()
    network = stage_network(problem.module, problem.inputs)
    specs: Specs = [{"modules": ["embed", "layers.2"]}, {"modules": ["layers.[345]"]}, {"modules": ["head"]}]
    sites = [SiteSpec(**spec, sigma=1e-4, queries_per_sample=400) for spec in specs]
    strategy = LikelihoodRatio(sites=sites, variant="antithetic", seed=0)
    strategy.bind(network, problem.loss)
    exact = exact_gradient(problem, network)
    slopes = []
    for _ in range(16):
        problem.module.zero_grad()
        strategy.estimate(strategy.clean_pass(problem.inputs, problem.targets))
        found = gradients(problem.module)
        slopes.append([slope(found, exact, list(site.parameters)) for site in strategy.sites])
    mean, error = torch.tensor(slopes).mean(0), torch.tensor(slopes).std(0) / 4
    assert error.max() < 0.05
    assert ((mean - 1).abs() < 4 * error).all()


def slope(found: Any, exact: dict[str, Tensor], names: list[str]) -> float:
    flat, true = (torch.cat([g[name].flatten() for name in names]) for g in (found, exact))
    return float(flat @ true / (true @ true))


@pytest.mark.parametrize(
    ("make", "spec", "message"),
    [
        (Twice, {"modules": ["a"]}, r"'a': is only a part of the stage 'c'.*: it runs more than once\. Name c instead"),
        (UNet, {"modules": ["down", "up"]}, r"'down'.*the stage 'up'.*passes beside its output\. Name up instead"),
        (Remembering, {"modules": ["c"]}, r"'c'.*the stage 'd'.*passes beside its output\. Name d"),
        (Tower, {"modules": ["layers.0.b"]}, r"the stage 'layers.0', .*another\. Name layers.0 instead"),
        (Tower, {"modules": ["layer.4"]}, r"'layer.4': is not a module of this network\. Choose from \['layers.4', "),
        (Tower, {"modules": ["*.b"]}, r"'layers.\d.b': is only a part of the stage 'layers.\d'"),
        (Tower, {"modules": ["zz*"]}, r"'zz\*': matches no module with parameters"),
        (Tower, {"modules": ["layers.[024]"]}, r"leaves out \['layers.1', 'layers.3'\].*write kind: block"),
        (Tower, {"modules": ["layers.0", "layers.1", "layers.2"]}, r"must be a range.*a pattern as in a shell"),
        (Tower, {"modules": ["layers.4", "layers.2"]}, r"runs backwards"),
        (Tower, {"modules": ["*"]}, r"\.modules = \['\*'\]: a group over the whole network"),
        (Tower, {}, r"names nothing to train\. Write \[first, last\] or \[only\], or modules"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)), {"modules": ["1.x"]}, r"is not a module"),
        (lambda: nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Tanh())), {"modules": ["0.1"]}, r"has no parameters"),
    ],
)
def test_modules_that_are_no_stages(make: Callable[[], nn.Module], spec: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        resolve_sites(stage_network(make().double(), normal(4, 4)), [SiteSpec(**spec)])


def test_linear_sites_need_no_stages() -> None:
    specs: Specs = [{"modules": ["layers.*"], "kind": "linear"}, {"modules": ["embed"]}, {"modules": ["head"]}]
    sites = resolve_sites(stage_network(Tower().double(), normal(4, 4)), [SiteSpec(**spec) for spec in specs])
    assert len(sites) == 14
    assert [site.name for site in sites if not site.layers] == ["embed", "head"]
