"""The overlay: a configuration file with what was found and nothing else."""

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from typing import Any, cast

import yaml

from flops_lightning.strategies import ForwardGradientStrategy, MeZO
from flops_lightning.strategies.site_specs import SiteSpec, default_specs
from flops_lightning.strategies.site_stages import named_stages
from flops_lightning.strategies.site_strategy import SiteStrategy
from flops_lightning.strategies.sites import Site
from flops_lightning.tasks import ForwardModule
from flops_lightning.tune.search import Tuned


def overlay(task: ForwardModule, tuned: Tuned, *, command: str) -> str:
    """The text of the file: where it is from, the figures that were found, and the settings."""
    strategy = cast("ForwardGradientStrategy", task.strategy)
    seed = getattr(strategy, "seed", None)
    lines = [f"Settings found for {type(strategy).__name__}{'' if seed is None else f', noise from seed {seed}'}."]
    lines += [f"  made by:  {command}", "  use:      add this file with --config, after those it was made with"]
    lines += [
        f"  {name}: sigma {s.found:g} instead of {s.given:g}; cosine between halves of the queries "
        f"{s.found_halves:.3f} instead of {s.given_halves:.3f}; the precision resolves {s.least:.1g}"
        for name, s in tuned.sigmas.items()
    ]
    settings = ["model:", "  init_args:"]
    if tuned.sigmas:
        # A width in units of the first batch, as AdapterAlignment has, would hide those of the sites.
        settings += ["    relative_sigma: 0.0"] if task.hparams.get("relative_sigma") else []
        settings += ["    strategy:", "      init_args:"]
        for name, value in strategy_settings(strategy, tuned.widths).items():
            listed = [f"          - {_flow(each)}" for each in value] if isinstance(value, list) else []
            settings += [f"        {name}:", *listed] if listed else [f"        {name}: {_flow(value)}"]
    if tuned.rate is not None:
        steps = max(trial.steps for trial in tuned.rate.trials)
        losses = (f"{t.loss:.3g} at {t.rate:.2g}" for t in tuned.rate.trials if t.steps == steps)
        lines.append(f"  learning rate: loss after {steps} steps {', '.join(losses)}")
        settings.append(f"    optimizer: {_flow({'lr': tuned.rate.found})}")
    return "".join(f"{line}\n" for line in (*(f"# {line}" for line in lines), *settings))


def strategy_settings(strategy: ForwardGradientStrategy, sigmas: Mapping[str, float]) -> dict[str, Any]:
    """Settings of a bound strategy that give its sites these widths."""
    if isinstance(strategy, MeZO):
        return {"sigma": next(iter(sigmas.values()))}
    if not isinstance(strategy, SiteStrategy):
        return {}
    in_parameters = any(site.in_parameters for site in strategy.sites)
    specs = strategy.specs or default_specs(strategy.network, in_parameters=in_parameters)
    own = [
        _narrowed(strategy, spec, site, sigmas.get(site.name, site.sigma))
        for spec in specs for site in (*strategy.sites, *strategy.exact_sites) if _made(strategy, spec, site)
    ]  # fmt: skip
    sites = {"sites": [_plain(spec) for spec in own]}
    # One width in place of the sites' own would hide these.
    return {"sigma": 0.0, **sites} if getattr(strategy, "sigma", 0.0) else sites


def _made(strategy: SiteStrategy, spec: SiteSpec, site: Site) -> bool:
    """Whether the setting made the site."""
    inside = {site.first, site.last} <= set(named_stages(strategy.network, spec, "model.strategy.sites"))
    if site.layers or spec.kind == "linear":
        matched = all(any(fnmatchcase(layer.name, each) for each in spec.layers) for layer in site.layers)
        return inside and bool(site.layers) and spec.kind == "linear" and matched
    return inside


def _narrowed(strategy: SiteStrategy, spec: SiteSpec, site: Site, sigma: float) -> SiteSpec:
    """The setting of one site alone, with the same name."""
    if spec.kind == "block":
        return replace(spec, stages=[strategy.network.stages[site.first].name], modules=[], sigma=sigma)
    if spec.kind == "linear" and not spec.together:
        return replace(spec, modules=[site.layers[0].name], sigma=sigma)
    return replace(spec, sigma=sigma)


def _plain(spec: SiteSpec) -> dict[str, Any]:
    """Its values, but for defaults that say nothing."""
    values, usual = asdict(spec), asdict(SiteSpec())
    first = ("name", "stages", "sigma", "queries_per_sample")
    return {name: values[name] for name in (*first, *values) if name in first[2:] or values[name] != usual[name]}


def _flow(value: Any) -> str:
    """YAML on one line."""
    return yaml.safe_dump(value, sort_keys=False, default_flow_style=True, width=math.inf).removesuffix("...\n").strip()
