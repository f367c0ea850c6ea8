"""Whether a precision resolves a noise width."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from flops_lightning.queries import CleanPass
from flops_lightning.strategies.sites import Site

# Below this many rounding steps of the activation the noise is mostly rounding error.
RESOLVED_STEPS = 32


def warn_unresolved_sigma(sites: Sequence[Site], clean: CleanPass) -> None:
    """Warn at every site whose sigma is below what the precision resolves, and name a workable value.

    The rounding step is the machine epsilon of the dtype in which the suffix computes times the RMS of what is
    perturbed, the activation or the parameters.
    """
    for site in sites:
        if not site.sigma:  # exact derivatives
            continue
        h = parameters_of(site) if site.in_parameters else clean.activations[site.start]
        device = h.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h.dtype
        if not dtype.is_floating_point:
            continue
        least = RESOLVED_STEPS * torch.finfo(dtype).eps * float(h.float().square().mean().sqrt())
        if site.sigma < least:
            warnings.warn(
                f"strategy.sites: sigma = {site.sigma:g} at site {site.name!r} is below what {dtype} resolves there. "
                f"Write {_rounded_up(least):g} or more, or use a higher precision.",
                RuntimeWarning, stacklevel=3,
            )  # fmt: skip


def parameters_of(site: Site) -> Tensor:
    """All parameters of a site in one vector."""
    return torch.cat([p.detach().flatten() for p in site.parameters.values()])


def _rounded_up(value: float) -> float:
    """The next number with one significant digit."""
    step = 10.0 ** math.floor(math.log10(value)) if value > 0 else 1.0
    return math.ceil(value / step) * step
