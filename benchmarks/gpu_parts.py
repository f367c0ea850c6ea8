"""Parts of ``python -m benchmarks.gpu``: networks, precisions, goals; whether estimates agree; what waits."""

import gc
import math
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.cases import DIGITS, VIT_BASE, site_specs, vit
from benchmarks.harness import Record
from benchmarks.speed import set_up, step
from flops_lightning.noise import philox
from flops_lightning.noise.generators import kernels_on, philox_normals, philox_signs
from flops_lightning.objectives import cross_entropy
from flops_lightning.strategies import Backprop, LikelihoodRatio
from flops_lightning.strategies.base import ForwardGradientStrategy

BASE = replace(VIT_BASE, batch=128, chunk_rows=256, rounds=3)
LARGE = replace(BASE, model="ViT-Large/16, 224 px", build=partial(vit, "vit_large_patch16_224"), groups=4, rounds=2)
"""The paper's settings: three and four groups and the head, 20 queries at each (appendix C.1)."""
SMALL = replace(DIGITS, batch=4, queries=4, chunk_rows=8, rounds=1, references=False)
PRECISIONS = ("bfloat16", "float32", "TF32")


@dataclass(frozen=True)
class Plan:
    """Where to measure.

    Attributes:
        quick: Take a tiny network in the place of all others.
        cifar10: Folder with the images, if there are any.
    """

    device: torch.device
    quick: bool
    cifar10: Path | None = None


Part = Callable[[Plan], Iterator[Record]]


def goal(name: str, value: float, *, least: float | None = None, most: float | None = None) -> Record:
    """A figure beside what it should at least, or at most, be."""
    met = value >= least if least is not None else value <= (math.inf if most is None else most)
    bound = {"least": least} if least is not None else {"most": most}
    return {"goal": name, "value": float(value), **bound, "met": bool(met)}


@contextmanager
def precision(name: str, device: torch.device) -> Iterator[None]:
    """``float32`` throughout, float32 with ``TF32`` products, or autocast to ``bfloat16``."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if name == "TF32" else "highest")
    torch.backends.cudnn.allow_tf32 = name == "TF32"  # of convolutions; torch's default is on
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=name == "bfloat16"):
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def within(name: str, device: torch.device, run: Callable[[], object]) -> Callable[[], object]:
    """``run`` in a precision of its own, as a step of Lightning: autocast keeps weights while its context lasts."""

    def wrapped() -> object:
        with precision(name, device):
            return run()

    return wrapped


def gradient(strategy: ForwardGradientStrategy, inputs: Tensor, targets: Tensor) -> Tensor:
    """``(p,)`` gradient of a step, on the CPU."""
    strategy.network.module.zero_grad()
    strategy.estimate(strategy.clean_pass(inputs, targets))
    parts = [p.grad for p in strategy.network.module.parameters() if p.grad is not None]
    return torch.cat([part.flatten() for part in parts]).cpu()


def give_back() -> None:
    """Free what was held, also by a step that failed."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def agreement(plan: Plan) -> Iterator[Record]:
    """(a) Noise and estimates beside the CPU's from the same Philox keys; and estimates beside exact gradients."""
    with precision("float32", plan.device):
        yield from same_noise(plan.device)
        yield same_estimates(plan.device)
        yield slope(plan.device, draws=30 if plan.quick else 400)


def same_noise(device: torch.device) -> Iterator[Record]:
    keys = torch.from_numpy(np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 64))
    for what, reference, draw, most in (
        ("signs", philox.signs, philox_signs, 0.0), ("normals", philox.normals, philox_normals, 1e-5),
    ):  # fmt: skip
        found = draw(keys.to(device), 10_001, torch.float32).cpu()
        largest = float((found - reference(keys, 10_001, torch.float32)).abs().max())
        drawn_by = "Triton" if kernels_on(device) else "torch"
        goals = [goal(f"largest difference of {what} from the CPU's", largest, most=most)]
        yield {"what": what, "drawn by": drawn_by, "largest difference": largest, "goals": goals}


def same_estimates(device: torch.device) -> Record:
    """``||g - g_cpu|| / ||g_cpu||``: losses differ in their last digits, and weights divide that by sigma."""
    case, found = replace(SMALL, chunk_rows=64, generator="philox"), []
    for each in (torch.device("cpu"), device):
        setup = set_up(case, each)
        found.append(gradient(setup.strategy, setup.inputs, setup.targets))
    difference = float((found[1] - found[0]).norm() / found[0].norm())
    goals = [goal("relative difference of a gradient from the CPU's", difference, most=1e-2)]
    return {"what": "gradient", "relative difference": difference, "goals": goals}


def slope(device: torch.device, *, draws: int) -> Record:
    """Mean over draws of ``g . g_exact / ||g_exact||^2``: 1 without bias, whatever the noise.

    Sigma is 1e-3. At 1e-2 the loss is curved over the noise, and the slope is that of the smoothed loss, 0.02 less.
    """
    case = replace(SMALL, batch=8, queries=20, chunk_rows=1024)
    network, inputs, targets = case.load(device)
    specs = [replace(spec, sigma=1e-3) for spec in site_specs(network, case.queries)]
    strategy, backprop = LikelihoodRatio(sites=specs, chunk_rows=1024, seed=0, generator="philox"), Backprop()
    strategy.bind(network, cross_entropy)
    backprop.bind(network, cross_entropy)
    exact = gradient(backprop, inputs, targets)
    found = torch.stack([gradient(strategy, inputs, targets) @ exact for _ in range(draws)]) / exact.square().sum()
    mean, error = float(found.mean()), float(found.std() / draws**0.5)
    goals = [goal("slope on the exact gradient, standard errors from 1", abs(mean - 1) / error, most=4.0)]
    return {"what": "slope", "slope": mean, "standard error": error, "draws": draws, "goals": goals}


def waiting(plan: Plan) -> Iterator[Record]:
    """(b) What waits for the device: nothing among the queries of a site; and where, in the rest of a step."""
    if plan.device.type != "cuda":
        yield {"what": "waits", "left out": "only CUDA tells; tests/strategies/test_no_wait.py counts on a CPU"}
        return
    setup = set_up(SMALL if plan.quick else BASE, plan.device)
    strategy: Any = setup.strategy
    step(setup)  # the first may wait: costs are measured, kernels compiled
    clean = strategy.clean_pass(setup.inputs, setup.targets)
    problems = []
    for site in strategy.sites:
        counts = np.full(clean.batch_size, int(site.queries_per_sample))
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.no_grad(), setup.network.evaluating():
                strategy.engine.query(site, clean, counts, traces=True)
        except RuntimeError as error:
            problems.append(f"{site.name}: {str(error).splitlines()[0]}")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    goals = [goal("sites whose queries wait", len(problems), most=0)]
    yield {"what": "queries", "waits": problems, "goals": goals}
    places = waits_of(lambda: step(setup))
    yield {"what": "step", "waits": sum(places.values()), "where": dict(places)}


def waits_of(run: Callable[[], object]) -> Counter[str]:
    """By file and line, how often ``run`` waits for a CUDA device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return places_of(caught)


def places_of(caught: Sequence[warnings.WarningMessage]) -> Counter[str]:
    found = [each for each in caught if "synchronizing CUDA operation" in str(each.message)]
    root = Path(sys.modules[__name__].__file__ or "").parents[1]
    return Counter(f"{each.filename.removeprefix(f'{root}/')}:{each.lineno}" for each in found)
