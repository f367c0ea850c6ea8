"""Where classes that a configuration may name have moved to."""

from __future__ import annotations

from importlib import import_module

PUBLIC = ("strategies", "allocators", "callbacks", "datamodules", "tasks", "network")
"""Subpackages whose classes are named without the module that defines them, so that they are found wherever it is."""
MOVED = {
    "benchmarks": "benchmarks",
    "checkpoint_io": "flops_lightning.resume.checkpoint_files",
    "planning": "flops_lightning.plan",
    "studies": "experiments",
    "tasks.optimisation": "flops_lightning.optim.optimizers",
}
"""New modules of the other names, by the old ones without ``flops_lightning.``"""


def new_name(path: str) -> str:
    """The dotted name that a class of this package now has; empty if it has not moved or was never there."""
    package, _, inner = path.partition(".")
    module, _, name = inner.rpartition(".")
    if package != "flops_lightning" or module in PUBLIC:
        return ""
    for public in PUBLIC:
        if name in import_module(f"flops_lightning.{public}").__all__:
            return f"flops_lightning.{public}.{name}"
    old = next((old for old in MOVED if f"{module}.".startswith(f"{old}.")), "")
    return f"{MOVED[old]}{module.removeprefix(old)}.{name}" if old else ""
