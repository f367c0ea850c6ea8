"""Sites: where noise enters, which parameters it trains, and how many queries are spent there.

Settings (:class:`SiteSpec`) are resolved against a staged network into sites (:class:`Site`); every trainable parameter
must end up in exactly one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, get_args

from numpy.typing import NDArray
from torch import nn

from flops_lightning.errors import SettingError, check_choice, check_positive
from flops_lightning.network.staging import StagedNetwork
from flops_lightning.noise.row_directions import has_row_directions
from flops_lightning.strategies.site_specs import Directions, SiteKind, SiteSpec, default_specs
from flops_lightning.strategies.site_stages import named_stages, range_name


@dataclass(frozen=True, eq=False)
class LayerTarget:
    """A module whose output is perturbed, and the tokens at which (None: all)."""

    name: str
    module: nn.Module
    tokens: slice | None


@dataclass(frozen=True, eq=False)
class Site:
    """A place where noise enters.

    Attributes:
        name: Its name in settings, logs and noise keys.
        first: Index of the first stage it owns parameters of.
        last: Index of the last.
        sigma: Standard deviation of the noise.
        queries_per_sample: Average queries of a sample.
        parameters: The parameters it trains, by name.
        tokens: Tokens of the boundary activation that get noise (None: all).
        narrow: The suffix may be run on these tokens alone.
        layers: For ``linear`` sites the perturbed modules; empty for ``block`` and ``group`` sites, whose noise enters
            at the output of stage ``last``.
        in_parameters: Noise enters the parameters themselves instead.
        directions: Whether rows share directions in the parameters, or each has its own.
        per_batch: A direction is paid for once, whatever the number of samples: all have the same number of queries.

    Example:
        >>> from flops_lightning import SiteSpec, stage_network
        >>> network = stage_network(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
        >>> body, head = resolve_sites(network, [SiteSpec(stages=["0", "1"], name="body"), SiteSpec(stages=["2"])])
        >>> body.name, body.start, list(body.parameters)  # queries run from the stage with index 2
        ('body', 2, ['0.weight', '0.bias'])
    """

    name: str
    first: int
    last: int
    sigma: float
    queries_per_sample: float
    parameters: dict[str, nn.Parameter]
    tokens: slice | None = None
    narrow: bool = False
    layers: tuple[LayerTarget, ...] = ()
    in_parameters: bool = False
    directions: Directions = ""
    per_batch: bool = False

    @property
    def start(self) -> int:
        """Index of the stage at which a query's forward pass starts."""
        return self.first if self.layers or self.in_parameters else self.last + 1

    def number(self, counts: NDArray[Any]) -> int:
        """Queries that are paid for ``(b,)`` counts: their sum, or the directions where all samples share them."""
        return int(counts.max(initial=0) if self.per_batch else counts.sum())

    @property
    def together(self) -> bool:
        """Whether several layers are perturbed in one query."""
        return len(self.layers) > 1


# They mean something else in the meter, in logs, or in the setting of pilots.
RESERVED_NAMES = ("clean", "total", "lost", "per_second", "forward_equivalents", "lowest", "deepest")


def resolve_sites(
    network: StagedNetwork, specs: Sequence[SiteSpec], *, in_parameters: bool = False
) -> tuple[Site, ...]:
    """Resolve settings against a network, bottom to top.

    None: the paper's layout, or all parameters of a network of one stage, where noise enters these.

    ``in_parameters``: noise enters the parameters of a site instead of its output.
    """
    sites: list[Site] = []
    for i, spec in enumerate(specs or default_specs(network, in_parameters=in_parameters)):
        setting = f"model.strategy.sites[{i}]"
        if in_parameters:
            _check_parameter_spec(spec, setting)
        sites += _resolve(network, spec, setting, in_parameters=in_parameters)
    sites.sort(key=lambda site: (site.last, site.first))
    names = [site.name for site in sites]
    for name in names:
        if name in RESERVED_NAMES:
            raise SettingError("model.strategy.sites", name, "is a reserved name.", "Give the site another `name`.")
        if names.count(name) > 1:
            raise SettingError(
                "model.strategy.sites", name, "is the name of two sites.", "Give each a `name` of its own."
            )
    _check_ownership(network, sites)
    return tuple(sites)


def _check_parameter_spec(spec: SiteSpec, setting: str) -> None:
    if spec.kind == "linear":
        raise SettingError(
            f"{setting}.kind", spec.kind, "adds noise to the outputs of layers, but this strategy perturbs parameters.",
            "Write kind: block or group, or use LikelihoodRatio.",
        )  # fmt: skip
    if not spec.active_tokens:
        raise SettingError(
            f"{setting}.active_tokens", False, "has no effect where parameters are perturbed.", "Leave it out."
        )


def _resolve(network: StagedNetwork, spec: SiteSpec, setting: str, *, in_parameters: bool) -> list[Site]:
    check_positive(f"{setting}.sigma", spec.sigma, "Write, for example, 0.01.")
    check_positive(f"{setting}.queries_per_sample", spec.queries_per_sample, "Write, for example, 4.")
    check_choice(f"{setting}.kind", spec.kind, get_args(SiteKind))
    check_choice(f"{setting}.directions", spec.directions, get_args(Directions))
    if spec.directions and not in_parameters:
        problem = "has no effect where noise enters activations."
        raise SettingError(f"{setting}.directions", spec.directions, problem, "Leave it out.")
    if spec.kind != "linear" and spec.together:
        raise SettingError(
            f"{setting}.kind", spec.kind, "does not take `together`.", "Remove it, or write kind: linear."
        )
    stages = named_stages(network, spec, setting)
    first, last = stages[0], stages[-1]
    if spec.kind == "linear":
        return _linear_sites(network, spec, setting, first, last)
    if spec.kind == "block":
        ranges = [(i, i) for i in stages if network.parameters_of(i, i)]
        names = [f"{spec.name}.{network.stages[i].name}" if spec.name else network.stages[i].name for i, _ in ranges]
    else:
        ranges = [(first, last)] if network.parameters_of(first, last) else []
        names = [spec.name or range_name(network, spec, first, last)]
    if not ranges:
        raise _nothing_to_train(setting, spec)
    whole = len(network) > 1 and (first, last) == (0, len(network) - 1)
    if whole and spec.kind == "group" and not in_parameters:
        raise SettingError(
            f"{setting}.{spec.by}", spec.named, "a group over the whole network is backpropagation by another name.",
            "Cut it into several groups, or use strategy Backprop.",
        )  # fmt: skip
    sites = [_boundary_site(network, spec, name, a, b) for name, (a, b) in zip(names, ranges, strict=True)]
    if in_parameters:
        return [_in_parameters(network, site, spec.directions) for site in sites]
    return sites


def _in_parameters(network: StagedNetwork, site: Site, directions: Directions) -> Site:
    # Frozen stages below the first trained one run in the clean pass alone.
    first = next(i for i in range(site.first, site.last + 1) if network.parameters_of(i, i))
    return replace(site, first=first, tokens=None, narrow=False, in_parameters=True, directions=directions)


def _boundary_site(network: StagedNetwork, spec: SiteSpec, name: str, first: int, last: int) -> Site:
    reader = network.stages[last + 1] if last + 1 < len(network) else None
    tokens = reader.reads if reader is not None and spec.active_tokens else None
    narrow = tokens is not None and reader is not None and reader.narrows
    parameters = network.parameters_of(first, last)
    return Site(name, first, last, spec.sigma, spec.queries_per_sample, parameters, tokens, narrow)


def _linear_sites(network: StagedNetwork, spec: SiteSpec, setting: str, first: int, last: int) -> list[Site]:
    trainable = network.trainable()
    layers: list[tuple[int, LayerTarget]] = []
    unmatched = set(spec.layers)
    for i in range(first, last + 1):
        for name, module in network.modules_of(i):
            patterns = {pattern for pattern in spec.layers if fnmatchcase(name, pattern)}
            unmatched -= patterns
            owned = any(f"{name}.{leaf}" in trainable for leaf, _ in module.named_parameters(recurse=False))
            if owned and patterns and has_closed_form(module):
                layers.append((i, LayerTarget(name, module, _active_tokens(network, spec, i, name))))
    if unmatched:
        where = f"the stages {spec.stages}" if spec.stages else "the network"
        raise SettingError(
            f"{setting}.modules", sorted(unmatched)[0], f"matches no module of {where}.",
            "Write a pattern for names like those in model.named_modules().",
        )  # fmt: skip
    if not layers:
        raise _nothing_to_train(setting, spec)
    _refuse_tied(network, [target for _, target in layers], setting)
    groups = [layers] if spec.together else [[layer] for layer in layers]
    joint = spec.name or range_name(network, spec, layers[0][0], layers[-1][0])
    prefix = f"{spec.name}." if spec.name else ""
    return [
        Site(
            name=joint if spec.together else prefix + members[0][1].name,
            first=members[0][0],
            last=members[-1][0],
            sigma=spec.sigma,
            queries_per_sample=spec.queries_per_sample,
            parameters={n: p for n, p in trainable.items() if any(n.rpartition(".")[0] == t.name for _, t in members)},
            layers=tuple(target for _, target in members),
        )
        for members in groups
    ]


def has_closed_form(module: nn.Module) -> bool:
    """Whether :func:`layer_gradient` knows the module: a linear, zero-padded 2-d convolution or layer norm of torch."""
    by_name = isinstance(module, nn.Conv2d) and isinstance(module.padding, str)
    return has_row_directions(module) and not isinstance(module, nn.GroupNorm) and not by_name


def _refuse_tied(network: StagedNetwork, layers: Sequence[LayerTarget], setting: str) -> None:
    uses = [id(p) for _, p in network.module.named_parameters(remove_duplicate=False)]
    for layer in layers:
        for leaf, parameter in layer.module.named_parameters(recurse=False):
            if uses.count(id(parameter)) > 1:
                raise SettingError(
                    f"{setting}.modules", layer.name, f"its {leaf} is tied to another layer's, and the closed form "
                    "at one would miss the other.", "Train its stage with kind: block.",
                )  # fmt: skip


def _active_tokens(network: StagedNetwork, spec: SiteSpec, stage: int, module: str) -> slice | None:
    here = network.stages[stage]
    if not spec.active_tokens or not any(module == part or module.startswith(part + ".") for part in here.tokenwise):
        return None
    return here.reads or (network.stages[stage + 1].reads if stage + 1 < len(network) else None)


def _nothing_to_train(setting: str, spec: SiteSpec) -> SettingError:
    what = f"modules {spec.layers} of " if spec.kind == "linear" else ""
    return SettingError(
        f"{setting}.{spec.by}", spec.named, f"{what}these stages have no trainable parameter for kind: {spec.kind}.",
        "Remove the site, unfreeze its parameters, or choose other stages or modules"
        + (" (kind: block trains every layer)." if spec.kind == "linear" else "."),
    )  # fmt: skip


def _check_ownership(network: StagedNetwork, sites: Sequence[Site]) -> None:
    owners: dict[str, list[str]] = {name: [] for name in network.trainable()}
    for site in sites:
        for name in site.parameters:
            owners[name].append(site.name)
    shared = {name: names for name, names in owners.items() if len(names) > 1}
    if shared:
        name, names = next(iter(shared.items()))
        raise SettingError(
            "model.strategy.sites", names, f"both own the parameter {name!r} ({len(shared)} in all).",
            "Make the ranges of stages disjoint.",
        )  # fmt: skip
    unowned = [name for name, names in owners.items() if not names]
    if unowned:
        raise _unowned(network, sites, unowned)


def _unowned(network: StagedNetwork, sites: Sequence[Site], unowned: Sequence[str]) -> SettingError:
    stages = list(dict.fromkeys(s.name for s in network.stages for name in unowned if s.owns(name)))
    layered = {network.stages[i].name for site in sites if site.layers for i in range(site.first, site.last + 1)}
    remedy = f"Add a site for the stages {stages}, or freeze these parameters (freeze: [...])."
    if layered & set(stages):
        # A second site for the stage would own the layers twice: the linear one has to go.
        remedy = (
            f"kind: linear trains linear, zero-padded convolution and layer-norm modules only: take the stages "
            f"{sorted(layered & set(stages))} out of it and train them with kind: block, or freeze these parameters."
        )
    more = ", ..." if len(unowned) > 6 else ""
    return SettingError(
        "model.strategy.sites", [site.name for site in sites],
        f"leave {len(unowned)} trainable parameters without a site: {', '.join(unowned[:6])}{more}.", remedy,
    )  # fmt: skip
