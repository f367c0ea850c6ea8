"""Parts of ``python -m benchmarks.gpu``: memory of a step beside inference and backprop, and which networks fit."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from benchmarks.cases import Case, vit
from benchmarks.gpu_parts import BASE, LARGE, PRECISIONS, SMALL, Plan, give_back, goal, within
from benchmarks.harness import Record
from benchmarks.speed import set_up, step
from flops_lightning.objectives import cross_entropy
from flops_lightning.strategies import Backprop

SIZES = (
    "vit_base_patch16_224", "vit_large_patch16_224", "vit_huge_patch14_224", "vit_giant_patch14_224",
    "vit_gigantic_patch14_224",
)  # fmt: skip
"""timm's ViTs at 224 pixels: 87, 304, 632, 1,011 and 1,843 million parameters."""


def memory(plan: Plan) -> Iterator[Record]:
    """(d) MiB at the peak of inference, of our step and of backprop, with the same batch and rows."""
    for case in (SMALL,) if plan.quick else (BASE, LARGE):
        for name in PRECISIONS:
            runs = steps(case, plan.device, name)
            if plan.device.type != "cuda":
                yield {"model": case.model, "precision": name, "left out": "python -m benchmarks.memory has a CPU's"}
                continue
            peaks = {what: peak(run, plan.device) for what, run in runs.items()}
            over = peaks["step"] / peaks["inference"]
            yield {
                "model": case.model, "batch": case.batch, "precision": name, "MiB": peaks,
                "step / inference": over, "step / backprop": peaks["step"] / peaks["backprop"],
                "goals": [goal("memory of a step / inference", over, most=1.3)],
            }  # fmt: skip


def steps(case: Case, device: torch.device, name: str) -> dict[str, Callable[[], object]]:
    """Inference of the batch, our step and backprop, with as many rows in a forward pass as the batch has."""
    # More queries take longer and no more memory.
    setup = set_up(replace(case, chunk_rows=case.batch, queries=2), device)
    backprop = Backprop()
    backprop.bind(setup.network, cross_entropy)
    runs: dict[str, Callable[[], object]] = {
        "inference": torch.no_grad()(partial(setup.network.module, setup.inputs)),
        "step": partial(step, setup),
        "backprop": partial(step, setup, backprop),
    }
    return {what: within(name, device, run) for what, run in runs.items()}


def peak(run: Callable[[], object], device: torch.device) -> float:
    """MiB at the peak of a second run, gradients of the first included."""
    run()
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return torch.cuda.max_memory_allocated(device) / 2**20


def fits(plan: Plan) -> Iterator[Record]:
    """(d) The largest of timm's ViTs that makes a gradient of a batch of 128 in float32, by our step and by backprop.

    Its products are in TF32, which takes as much memory and less time. No optimiser's state.
    """
    sizes = ("quick",) if plan.quick else SIZES
    largest, left = {"step": "none", "backprop": "none"}, ["step", "backprop"]
    for size in sizes:
        case = SMALL if plan.quick else replace(BASE, model=size, build=partial(on_device, size, plan.device))
        for what in tuple(left):
            if holds(case, plan.device, what):
                largest[what] = size
            else:
                left.remove(what)
            give_back()
        yield {"model": size, "fit": list(left)}
        if not left:
            break
    yield {"largest": largest}


def holds(case: Case, device: torch.device, what: str) -> bool:
    """Whether the device has the memory for a step."""
    try:
        steps(case, device, "TF32")[what]()
        return True
    except torch.OutOfMemoryError:
        return False


def on_device(size: str, device: torch.device) -> nn.Module:
    """Weights of billions are drawn fastest where they stay."""
    with device:
        return vit(size)
