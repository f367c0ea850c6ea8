"""Which stages of a network the setting of a site names: by their own names, or by those of modules."""

from difflib import get_close_matches
from fnmatch import fnmatchcase

from flops_lightning.errors import SettingError
from flops_lightning.network.staging import StagedNetwork
from flops_lightning.strategies.site_specs import SiteSpec

WRITE = "Write [first, last] or [only]."


def named_stages(network: StagedNetwork, spec: SiteSpec, setting: str) -> list[int]:
    """Indices of the stages that a site names, in order.

    Of a ``linear`` site those of its `stages`, without which they are all; its `modules` are layers in them.

    Raises:
        SettingError: a name is not that of a stage, or of a module that is one or several of them; the names are no
            range.
    """
    # ["*"] was the default in earlier versions, and stands in configurations that these saved.
    if spec.stages and spec.modules not in ([], ["*"]) and spec.kind != "linear":
        raise SettingError(
            f"{setting}.modules", spec.modules, f"is given together with stages: {spec.stages}.",
            "Remove one of the two, or write kind: linear.",
        )  # fmt: skip
    if spec.stages:
        return _between(f"{setting}.stages", spec.stages, [[_stage(network, n, setting)] for n in spec.stages])
    if spec.kind == "linear":
        return list(range(len(network)))
    if not spec.modules:
        raise SettingError(f"{setting}.stages", [], "names nothing to train.", f"{WRITE[:-1]}, or modules: [...].")
    setting = f"{setting}.modules"
    if has_patterns(spec):
        names = sorted(_matching(network, spec, setting))
        found = sorted({i for name in names for i in _of_module(network, name, setting)})
    else:
        of_names = [_of_module(network, name, setting) for name in spec.modules]
        found = of_names[0] if len(of_names) == 1 else _between(setting, spec.modules, of_names)
    gaps = [
        network.stages[i].name for i in range(found[0], found[-1]) if i not in found and network.parameters_of(i, i)
    ]
    if gaps and spec.kind == "group":
        raise SettingError(
            setting, spec.modules, f"leaves out {gaps}, which lie between what it names.",
            "A group is one range: name these as well, or write kind: block or a site for each range.",
        )  # fmt: skip
    return found


def has_patterns(spec: SiteSpec) -> bool:
    """Whether the modules that a site names are patterns."""
    return any(sign in name for name in spec.modules for sign in "*?[")


def range_name(network: StagedNetwork, spec: SiteSpec, first: int, last: int) -> str:
    """Name of a site for this range of stages where its setting gives none."""
    stages = [network.stages[i].name for i in (first, last)]
    return "..".join(dict.fromkeys(spec.stages or (stages if has_patterns(spec) else spec.modules)))


def _stage(network: StagedNetwork, name: str, setting: str) -> int:
    if name not in network.index:
        problem = "is not a stage of this network."
        raise SettingError(f"{setting}.stages", name, problem, f"Choose from {list(network.index)}.")
    return network.index[name]


def _between(setting: str, names: list[str], ends: list[list[int]]) -> list[int]:
    if len(ends) > 2:
        raise SettingError(
            setting, names, "must be a range.", f"{WRITE[:-1]}, a pattern as in a shell, or several sites."
        )
    first, last = ends[0][0], ends[-1][-1]
    if ends[0] != ends[-1] and ends[0][-1] >= ends[-1][0]:
        raise SettingError(setting, names, "runs backwards.", "Write the lower one first.")
    return list(range(first, last + 1))


def _matching(network: StagedNetwork, spec: SiteSpec, setting: str) -> set[str]:
    """Names of the stages that the patterns of a site match; of the outermost modules, where one matches no stage."""
    modules = [
        name for name, module in network.module.named_modules() if name and any(True for _ in module.parameters())
    ]
    found: set[str] = set()
    for pattern in spec.modules:
        stages, inner = ({n for n in names if fnmatchcase(n, pattern)} for names in (network.index, modules))
        outermost = {n for n in inner if not any(n.startswith(f"{other}.") for other in inner)}
        if not stages and not inner:
            raise SettingError(
                setting, pattern, "matches no module with parameters.",
                "Write a pattern for names like those in model.named_modules().",
            )  # fmt: skip
        found |= stages or outermost
    return found


def _of_module(network: StagedNetwork, name: str, setting: str) -> list[int]:
    """The stages that a module is."""
    if name in network.index:
        return [network.index[name]]
    parameters = list(network.module.named_parameters(remove_duplicate=False))
    if name not in dict(network.module.named_modules()):
        known = list(dict.fromkeys([*network.index, *(n for n, _ in network.module.named_modules() if n)]))
        close = get_close_matches(name, known, cutoff=0.5) or list(network.index)
        raise SettingError(setting, name, "is not a module of this network.", f"Choose from {close}.")
    own = {n for n, _ in parameters if n.startswith(f"{name}.")}
    if not own:
        raise SettingError(setting, name, "has no parameters.", "Name a module that has some.")
    found = [i for i, stage in enumerate(network.stages) if any(stage.owns(n) for n in own)]
    beside = {n for n, _ in parameters if any(network.stages[i].owns(n) for i in found)} - own
    if not beside:
        return found
    names = [network.stages[i].name for i in found]
    what = f"the stage {names[0]!r}" if len(names) == 1 else f"the stages {names}"
    why = network.obstacle(name)
    raise SettingError(
        setting, name, f"is only a part of {what}, of which {sorted(beside)[0]!r} is another"
        + (f": {why}." if why else "."),
        f"Name {names[0] if len(names) == 1 else [names[0], names[-1]]} instead; "
        "layers inside train with kind: linear.",
    )  # fmt: skip
