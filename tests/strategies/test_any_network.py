"""The slow references again, on networks, sites and counts that nobody thought of, and on stages of unusual kinds."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flops_lightning.errors import SettingError
from flops_lightning.strategies import LikelihoodRatio
from tests.reference import likelihood_ratio, parameter_perturbation
from tests.reference.layouts import SIGMA
from tests.reference.networks import Prompted, TokenMean, bound_to, shaken, squared_error
from tests.reference.parameter_perturbation import LAYOUTS, RANKS, STRATEGIES

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*contribute nothing"),
    pytest.mark.filterwarnings("ignore:.*has no effect. derivatives are exact"),  # sigma, set for all
]


class Mix(nn.Module):
    """Mixes two tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(2, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(x.mT).mT


class Attention(nn.Module):
    """Its weights are parameters of its own, read by no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(3, 1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, need_weights=False)[0]


class Transposed(nn.Module):
    """A convolution that has no row directions."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.ConvTranspose1d(3, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x.mT).mT


class InPlaceResidual(nn.Module):
    """Adds to its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():  # where autograd would refuse the overwritten input
            return x + self.layer(x)
        x += self.layer(x)
        return x


STAGES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(3, 3),
    "no bias": lambda: nn.Linear(3, 3, bias=False),
    "norm": lambda: nn.LayerNorm(3),
    "tanh": nn.Tanh,
    "nested": lambda: nn.Sequential(nn.Linear(3, 4), nn.SiLU(inplace=True), nn.Linear(4, 3)),
    "in place": lambda: nn.SiLU(inplace=True),
    "dropout": lambda: nn.Dropout(0.5),
    "brittle": lambda: nn.Threshold(-1.5, math.nan),
}
IN_ACTIVATIONS = {**STAGES, "mix": Mix, "residual": InPlaceResidual}
IN_PARAMETERS = {
    **STAGES, "residual": InPlaceResidual, "prompts": Prompted, "attention": Attention, "transposed": Transposed
}  # fmt: skip
# The reference has no derivative through what works in place, and forward mode none of fused attention.
DIFFERENTIABLE = {k: v for k, v in IN_PARAMETERS.items() if k not in ("attention", "nested", "in place", "residual")}
KINDS = ({"kind": "group"}, {"kind": "block"}, {"kind": "linear"}, {"kind": "linear", "together": True})


@st.composite
def problems(draw: st.DrawFn, stages: dict[str, Callable[[], nn.Module]], kinds: Any) -> tuple[nn.Module, list[Any]]:
    """A network of one to five stages and a head, some parameters frozen, and sites in one to three ranges of it."""
    chosen = draw(st.lists(st.sampled_from(sorted(stages)), min_size=1, max_size=5))
    torch.manual_seed(draw(st.integers(0, 99)))
    net = shaken(nn.Sequential(*(stages[stage]() for stage in chosen), TokenMean(), nn.Linear(3, 2)))
    for parameter in list(net.parameters())[:-1]:
        parameter.requires_grad_(draw(st.integers(0, 4)) > 0)
    cuts = sorted({0, len(net), *draw(st.lists(st.integers(1, len(net) - 1), min_size=1, max_size=2))})
    return net.train(draw(st.booleans())), [
        {"stages": [str(a), str(b - 1)], "sigma": 0.3, "name": f"from {a}", **draw(st.sampled_from(kinds))}
        for a, b in itertools.pairwise(cuts)
        if any(p.requires_grad for p in net[a:b].parameters())
    ]


def assert_equals_reference(data: st.DataObject, strategy: Any, compare: Callable[..., None]) -> None:
    strategy.draw, strategy.rank = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 1))
    batch = data.draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x, y = (torch.randn(batch, *shape, generator=generator, dtype=torch.float64) for shape in ((2, 3), (2,)))
    usable = {"antithetic": [0, 2, 4, 6], "leave_one_out": [0, 2, 3]}.get(strategy.variant, [0, 1, 2, 3])
    table = [[data.draw(st.sampled_from(usable)) for _ in range(batch)] for _ in strategy.sites]
    compare(strategy.network.module, strategy, x, y, torch.tensor(table))


@settings(max_examples=80)
@given(data=st.data())
def test_noise_in_activations(data):
    net, sites = data.draw(problems(IN_ACTIVATIONS, KINDS))
    own = {"variant": data.draw(st.sampled_from(["plain", "baseline", "leave_one_out", "antithetic"]))}
    try:
        strategy = bound_to(LikelihoodRatio, net, squared_error, sites, chunk_rows=data.draw(st.integers(2, 9)), **own)
    except SettingError:  # leave-one-out of layers together, or layers that have no linear site
        reject()
    assert_equals_reference(data, strategy, likelihood_ratio.assert_equals_reference)


@settings(max_examples=40)
@given(data=st.data())
def test_noise_in_parameters(data):
    name = data.draw(st.sampled_from(sorted(STRATEGIES)))
    net, sites = data.draw(problems(DIFFERENTIABLE if name == "forward" else IN_PARAMETERS, KINDS[:2]))
    own = (LAYOUTS | RANKS)[data.draw(st.sampled_from(sorted(LAYOUTS | RANKS)))]
    kind, variant = STRATEGIES[name]
    rows = data.draw(st.integers(2, 9))
    strategy = bound_to(kind, net, squared_error, sites, chunk_rows=rows, **variant, **own)
    assert_equals_reference(data, strategy, parameter_perturbation.assert_equals_reference)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("strategy", "stages"),
    [
        *(("spsa", [lambda: nn.Linear(3, 3), stage]) for stage in (Prompted, Attention, Transposed)),
        *(("spsa", [lambda: nn.Embedding(10, 3), stage]) for stage in (Prompted, Transposed)),
        ("forward", [lambda: nn.Embedding(10, 3), Prompted]),
        *((name, [InPlaceResidual, InPlaceResidual]) for name in ("baseline", "spsa", "forward")),
        ("spsa", [lambda: nn.Sequential(nn.SiLU(inplace=True), nn.Linear(3, 3)), InPlaceResidual]),
    ],
)
def test_stages_of_other_kinds(strategy, stages, layout, tokens):
    """Parameters of no layer, integer inputs, and stages that write to the batch, the clean pass or the other sign."""
    net, (x, y) = shaken(nn.Sequential(*(stage() for stage in stages), TokenMean(), nn.Linear(3, 2))), tokens
    x = torch.tensor([[1, 2], [2, 9], [0, 0], [3, 1]]) if isinstance(net[0], nn.Embedding) else x
    kind, own = STRATEGIES[strategy]
    for sites in ([{"stages": ["0", "3"], **SIGMA}], [{"stages": ["0"], **SIGMA}, {"stages": ["1", "3"], **SIGMA}]):
        chosen = bound_to(kind, net, squared_error, sites, chunk_rows=3, **own, **LAYOUTS[layout])
        parameter_perturbation.assert_equals_reference(net, chosen, x, y, torch.tensor([4, 0, 6, 2]))


class OddlyCalled(nn.Module):
    """Calls its layer twice, by keyword, with the tokens first, or uses its weights alone."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "tokens first":
            return self.inner(x.transpose(0, 1)).transpose(0, 1)
        if self.how == "keyword":
            return self.inner(input=x)
        if self.how == "weights":
            return nn.functional.linear(x, self.inner.weight, self.inner.bias)
        return self.inner(self.inner(x))


@pytest.mark.parametrize(
    ("how", "factored", "linear"),
    [
        ("twice", "did not run exactly once", "did not run exactly once"),
        ("weights", "did not run exactly once", "did not run exactly once"),
        ("keyword", "is called by keyword", "is called by keyword"),
        ("tokens first", "returns 3 lines for 2 rows and 3 for 3", "returns 3 lines for 2 rows and 3 for 3"),
    ],
)
def test_a_layer_that_is_called_oddly(how, factored, linear, tokens):
    """The shared layout replaces parameters and minds nothing; the others move the outputs of layers."""
    net = shaken(nn.Sequential(OddlyCalled(how), TokenMean(), nn.Linear(3, 2)))
    site, spsa = {"stages": ["0", "2"], **SIGMA}, STRATEGIES["spsa"][0]
    shared = bound_to(spsa, net, squared_error, [site])
    parameter_perturbation.assert_equals_reference(net, shared, *tokens, torch.tensor([4, 0, 6, 2]))
    refused = [
        (bound_to(spsa, net, squared_error, [site], **LAYOUTS[layout]), rf"layout = 'factored': 0.inner {factored}")
        for layout in ("factored", "guided")
    ]
    own = bound_to(spsa, net, squared_error, [{**site, "directions": "own"}])
    refused.append((own, rf"layout = 'shared': 0.inner {factored}.*write directions: shared at this site"))
    sites = [{**site, "kind": "linear"}]
    refused.append((bound_to(LikelihoodRatio, net, squared_error, sites), rf"'0\.inner': {linear}.*kind: block"))
    for strategy, problem in refused:
        with pytest.raises(SettingError, match=problem):
            strategy.estimate(strategy.clean_pass(*tokens))
        assert all(p.grad is None for p in net.parameters())
