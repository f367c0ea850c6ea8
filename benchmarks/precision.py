"""``python -m benchmarks.precision``: what a sigma is worth in each precision, and, with ``rule``, how wide it must be.

Every estimate is made in every precision with the same noise. Two cosines over all parameters are reported, the
mean and the standard error over the seeds (each a batch and noise of its own):

* with the gradient of the batch by backprop in float32: what the optimiser gets;
* in brackets with the estimate from exact derivatives along the same directions (forward mode in float32): 1 but for
  rounding, which takes its share at small sigma, and for curvature, which takes its own at large sigma.
"""

import statistics
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import flops_lightning as fl
from benchmarks.cases import site_specs, tiny_digits_vit, vit
from benchmarks.harness import Record, command, finish, mean_and_error, say, table
from flops_lightning.network.staging import StagedNetwork, stage_network
from flops_lightning.objectives import cross_entropy
from flops_lightning.strategies.precision import TF32_EPS, Resolution, perturbed_values

DIGITS_WEIGHTS = "data/assets/vit_tiny_digits_upright.safetensors"
SIGMAS = (1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0)
METHODS = ("LikelihoodRatio, blocks", "SPSA, factored", "MeZO")

Batch = tuple[Tensor, Tensor]

# Products, and which of their arguments are operands: a bias and what is added are not.
_OPERANDS: dict[Any, tuple[int, ...]] = {
    **dict.fromkeys((F.linear, F.conv2d, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm), (0, 1)),
    torch.baddbmm: (1, 2),
}


def tf32_rounded(x: Tensor) -> Tensor:
    """``x`` with the mantissa of TF32 (10 bits beside the leading one), to nearest; finite float32 below 2^115."""
    scaled = x * (2.0**13 + 1)  # Veltkamp's splitting: the leading 24 - 13 bits
    return scaled - (scaled - x)


class SimulatedTF32(TorchFunctionMode):
    """Rounds the operands of the products that a timm ViT and the perturbations of this package make.

    Products inside a backward pass are not seen: the local VJP keeps its float32.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        operands = _OPERANDS.get(func, ())
        return func(*(_rounded(arg) if i in operands else arg for i, arg in enumerate(args)), **(kwargs or {}))


def _attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False
) -> Tensor:
    if dropout_p or is_causal or attn_mask is not None:
        raise ValueError("attention with a mask or dropout is not simulated.")
    q, k, v = map(_rounded, (q, k, v))
    return _rounded(((q @ k.mT) * q.shape[-1] ** -0.5).softmax(-1)) @ v


def _rounded(x: Any) -> Any:
    return tf32_rounded(x) if isinstance(x, Tensor) and x.dtype == torch.float32 else x


PRECISIONS: Mapping[str, Callable[[], AbstractContextManager[object]]] = {
    "float32": nullcontext,
    "TF32 (simulated)": SimulatedTF32,
    "float16": partial(torch.autocast, "cpu", dtype=torch.float16),
    "bfloat16": partial(torch.autocast, "cpu", dtype=torch.bfloat16),
}


def digits(batch: int, seed: int) -> tuple[StagedNetwork, Batch]:
    """The quickstart's network and start weights, and a batch of its turned digits."""
    from safetensors.torch import load_file

    from flops_lightning.datamodules import DigitsDataModule

    network = tiny_digits_vit().eval()
    network.load_state_dict(load_file(DIGITS_WEIGHTS))
    data = DigitsDataModule(batch_size=batch, rotation=40.0)
    data.setup("fit")
    torch.manual_seed(seed)
    images, labels = next(iter(data.train_dataloader()))
    return stage_network(network), (images, labels)


def random_vit_tiny(batch: int, seed: int) -> tuple[StagedNetwork, Batch]:
    """ViT-Tiny/16 with random weights, and noise for images."""
    torch.manual_seed(seed)
    network = stage_network(vit().eval())
    return network, (torch.randn(batch, 3, 224, 224), torch.randint(1000, (batch,)))


def deep_mlp(batch: int, seed: int) -> tuple[StagedNetwork, Batch]:
    """20 layers of width 64 with norms, random weights, and noise for data."""
    torch.manual_seed(seed)
    layers = [layer for _ in range(20) for layer in (nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU())]
    network = stage_network(nn.Sequential(*layers, nn.Linear(64, 10)))
    return network, (torch.randn(batch, 64), torch.randint(10, (batch,)))


NETWORKS = {"digits": digits, "vit_tiny": random_vit_tiny, "mlp20": deep_mlp}
"""By name: a network with a batch of a given size and seed."""


def gradients(strategy: fl.ForwardGradientStrategy, network: StagedNetwork, batch: Batch) -> dict[str, Tensor]:
    """The estimate, one float64 vector per trainable parameter; zeros where all queries were lost."""
    strategy.bind(network, cross_entropy)
    network.module.zero_grad()
    strategy.estimate(strategy.clean_pass(*batch))
    filled = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in network.trainable().items()}
    return {name: value.detach().double().flatten() for name, value in filled.items()}


def gradient(strategy: fl.ForwardGradientStrategy, network: StagedNetwork, batch: Batch) -> Tensor:
    """The estimate over all trainable parameters as one float64 vector."""
    return torch.cat(list(gradients(strategy, network, batch).values()))


def cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a, b, dim=0))


def pair(
    method: str, network: StagedNetwork, sigma: float, *, queries: int, rows: int, seed: int
) -> tuple[fl.ForwardGradientStrategy, fl.ForwardGradientStrategy]:
    """One of :data:`METHODS`, and exact derivatives along the same directions."""
    common: dict[str, Any] = {"chunk_rows": rows, "seed": seed}
    directions = max(2, queries // 2)  # of antithetic pairs
    if method == "MeZO":
        ends = [network.stages[0].name, network.stages[-1].name]
        whole = fl.SiteSpec(stages=ends, queries_per_sample=directions, name="all")  # MeZO's own name: part of the key
        return fl.MeZO(sigma=sigma, queries=2 * directions, **common), fl.WeightForwardMode(sites=[whole], **common)
    if method == "SPSA, factored":
        exact = site_specs(network, directions)
        pairs = [replace(spec, sigma=sigma, queries_per_sample=2 * directions) for spec in exact]
        common["layout"] = "factored"
        return fl.SPSA(sites=pairs, **common), fl.WeightForwardMode(sites=exact, **common)
    (spec,) = site_specs(network, queries, "block")
    return fl.LikelihoodRatio(sites=[replace(spec, sigma=sigma)], **common), fl.ForwardMode(sites=[spec], **common)


def cosines(
    method: str, network: StagedNetwork, batch: Batch, sigmas: Sequence[float], precisions: Sequence[str], **size: int
) -> dict[tuple[float, str], tuple[float, float]]:
    """With the gradient, and with exact derivatives along the same directions; ``size`` is that of :func:`pair`."""
    truth = gradient(fl.Backprop(), network, batch)
    along = gradient(pair(method, network, sigmas[0], **size)[1], network, batch)
    found = {}
    for sigma, precision in product(sigmas, precisions):
        with PRECISIONS[precision]():
            estimate = gradient(pair(method, network, sigma, **size)[0], network, batch)
        found[sigma, precision] = (cosine(estimate, truth), cosine(estimate, along))
    return found


RULE = """Print how wide noise must be, in rounding steps.

A rounding step is the precision's machine epsilon times the root mean square of what is perturbed, at each site its own
(:class:`~flops_lightning.strategies.precision.Resolution`). Reported is the second cosine, lowest and highest of the
sites of the default layout: 1 but for rounding and curvature, however few the directions are.
"""
EPS = {
    "float32": torch.finfo(torch.float32).eps, "TF32 (simulated)": TF32_EPS,
    "float16": torch.finfo(torch.float16).eps, "bfloat16": torch.finfo(torch.bfloat16).eps,
}  # fmt: skip
STEPS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
SIZES = {"digits": (16, 10), "vit_tiny": (2, 8), "mlp20": (16, 10)}
"""By network: samples in the batch, and queries of each at each site."""
NOISE: Mapping[str, tuple[Any, Any, dict[str, Any]]] = {
    "activations": (fl.LikelihoodRatio, fl.ForwardMode, {}),
    "parameters, shared": (fl.EvolutionStrategies, fl.WeightForwardMode, {}),
    "parameters, factored": (fl.EvolutionStrategies, fl.WeightForwardMode, {"layout": "factored"}),
}
"""By name: a method, exact derivatives along the same directions, and settings of both."""


def cosine_ranges(
    network_name: str, noise: str, precision: str, *, steps: Sequence[float]
) -> list[tuple[float, float]]:
    """Lowest and highest cosine of the sites at each number of rounding steps."""
    samples, queries = SIZES[network_name]
    network, batch = NETWORKS[network_name](samples, 0)
    method, exact_method, settings = NOISE[noise]
    specs = site_specs(network, queries)

    def estimate(cls: Any, sites: list[fl.SiteSpec]) -> dict[str, Tensor]:
        strategy = cls(sites=sites, seed=0, chunk_rows=16, **settings)
        found = gradients(strategy, network, batch)
        return {site.name: torch.cat([found[name] for name in site.parameters]) for site in strategy.sites}

    exact, plain = estimate(exact_method, specs), method(sites=specs, seed=0, chunk_rows=16, **settings)
    plain.bind(network, cross_entropy)
    clean, one = plain.clean_pass(*batch), Resolution("", EPS[precision], 1.0)
    width = {site.name: one.least_width(*perturbed_values(site, clean)) for site in plain.sites}
    ranges = []
    for step in steps:
        with PRECISIONS[precision]():
            found = estimate(method, [replace(spec, sigma=step * width[str(spec.name)]) for spec in specs])
        near = sorted(cosine(found[name], exact[name]) for name in exact)
        ranges.append((near[0], near[-1]))
    return ranges


def rule(argv: Sequence[str]) -> None:
    parser = command("benchmarks.precision rule", f": {RULE}")
    for name, known in {"networks": SIZES, "methods": NOISE, "precisions": PRECISIONS}.items():
        parser.add_argument(f"--{name}", nargs="+", choices=known, default=list(known), help="default all")
    options = parser.parse_args(argv)
    records: list[Record] = []
    for network, method in product(options.networks, options.methods):
        say(f"estimating {network}, {method} ...")
        for precision in options.precisions:
            ranges = dict(zip(map(str, STEPS), cosine_ranges(network, method, precision, steps=STEPS), strict=True))
            records.append({"network": network, "method": method, "precision": precision, "cosines": ranges})
    columns = {"network, noise": "{network}, {method}", "precision": "{precision}"}
    columns |= {f"{step:g}": f"{{cosines[{step}][0]:.2f}} - {{cosines[{step}][1]:.2f}}" for step in STEPS}
    print(table(columns, records))
    finish(options, records)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print a table for each method; after ``rule`` that of the rule."""
    argv = list(sys.argv[1:] if argv is None else argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RuntimeWarning)  # of the sigmas that are too small: that is what is measured
    if argv[:1] == ["rule"]:
        rule(argv[1:])
        return
    parser = command("benchmarks.precision", __doc__, seeds=4, batch=16, queries=20, rows=128)
    parser.add_argument("--network", choices=NETWORKS, default="digits", help="default digits")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="default all")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), help="default all")
    parser.add_argument("--sigmas", nargs="+", type=float, default=SIGMAS, help=f"default {SIGMAS}")
    options = parser.parse_args(argv)
    records: list[Record] = []
    for method in options.methods:
        say(f"estimating with {method} ...")
        found = []
        for seed in range(options.seeds):
            network, batch = NETWORKS[options.network](options.batch, seed)
            size = {"queries": options.queries, "rows": options.rows, "seed": seed}
            found.append(cosines(method, network, batch, options.sigmas, options.precisions, **size))
        shown: dict[float, Record] = {sigma: {"sigma": sigma} for sigma in options.sigmas}
        for sigma, precision in found[0]:
            true, along = zip(*(of_seed[sigma, precision] for of_seed in found), strict=True)
            shown[sigma][precision] = f"{mean_and_error(true)} ({statistics.fmean(along):.2f})"
            setting = {"method": method, "sigma": sigma, "precision": precision}
            records.append({**setting, "cosines": true, "cosines_with_exact_derivatives": along})
        columns = {"sigma": "{sigma:g}"} | {precision: f"{{{precision}}}" for precision in options.precisions}
        print(f"{method}:\n\n{table(columns, shown.values())}\n", flush=True)
    finish(options, records)


if __name__ == "__main__":
    main()
