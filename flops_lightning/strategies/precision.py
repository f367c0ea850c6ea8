"""What a precision resolves, and which passes must not run in half precision.

The rule for sigma was measured, on two ViTs and on plain networks: ``docs/precision.md``.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flops_lightning.network.rows import Rows, value_of
from flops_lightning.queries import CleanPass, at_least_float32, full_precision
from flops_lightning.strategies.sites import Site

TF32_EPS = 2.0**-10
"""Machine epsilon of the operands of TF32 products."""


@dataclass(frozen=True)
class Resolution:
    """How finely a network computes.

    The noise must be ``steps`` rounding steps wide; ``eps`` is the precision's machine epsilon.
    """

    name: str
    eps: float
    steps: float

    @classmethod
    def products(cls, name: str, eps: float) -> "Resolution":
        """Only the operands of products are rounded: autocast, TF32."""
        return cls(name, eps, 2.0)

    @classmethod
    def everything(cls, dtype: torch.dtype) -> "Resolution":
        """Every result is rounded, down to the loss."""
        return cls(str(dtype), torch.finfo(dtype).eps, 16.0)

    def least_width(self, *values: Tensor) -> float:
        """The least noise on these values that stands out of the rounding.

        A rounding step is the machine epsilon times the root mean square of the values. Nothing of their size is made,
        since they may be all the weights of a network.
        """
        norms = [
            torch.linalg.vector_norm(v.detach(), dtype=torch.promote_types(v.dtype, torch.float32)) for v in values
        ]
        squares = sum(float(norm) ** 2 for norm in norms)
        return self.steps * self.eps * math.sqrt(squares / max(1, sum(v.numel() for v in values)))


def resolution(values: Tensor, *, convolutions: bool = False) -> Resolution | None:
    """How finely a network computes that runs at present and on these floating-point values; None: they are integers.

    On a GPU ``convolutions`` have a setting of their own (and TF32 by default).
    """
    kind = values.device.type
    if not values.dtype.is_floating_point:
        return None
    if torch.is_autocast_enabled(kind) and values.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        if dtype != torch.float32:
            return Resolution.products(str(dtype), torch.finfo(dtype).eps)
    if values.dtype == torch.float32 and kind == "cuda" and _tf32(convolutions=convolutions):
        return Resolution.products("TF32", TF32_EPS)
    return Resolution.everything(values.dtype)


def _tf32(*, convolutions: bool) -> bool:
    """Whether products of float32 tensors on a GPU are TF32 products (older GPUs than Ampere take no notice)."""
    backends: list[Any] = [torch.backends.cuda.matmul]
    if convolutions:
        backends.append(getattr(torch.backends.cudnn, "conv", torch.backends.cudnn))
    # Before torch 2.9 there are flags alone; later on, asking for the flag where the word was set is an error.
    words = [getattr(each, "fp32_precision", None) or ("tf32" if each.allow_tf32 else "ieee") for each in backends]
    return "tf32" in words


def perturbed_values(site: Site, clean: CleanPass) -> list[Tensor]:
    """What a site's noise is added to, before it is: its parameters, or the activation that enters its suffix."""
    return list(site.parameters.values()) if site.in_parameters else [value_of(clean.activations[site.start])]


def least_sigma(site: Site, sites: Sequence[Site], clean: CleanPass) -> tuple[Resolution | None, float]:
    """How finely the network computes at one of the sites, and the least sigma that this resolves there."""
    moved = perturbed_values(site, clean)
    above = [p for other in sites if other.last >= site.start for p in other.parameters.values()]
    found = resolution(moved[0], convolutions=any(p.dim() > 3 for p in above))
    return found, 0.0 if found is None else found.least_width(*moved)


def warn_unresolved_sigma(sites: Sequence[Site], clean: CleanPass) -> None:
    """Warn at every site whose sigma is below what the precision resolves, and name a workable value.

    Compared are sigma and the rounding step of what is perturbed, the activation or the parameters; see
    :class:`Resolution`. Two rounding steps where products alone are rounded, 16 where the loss is rounded as well.
    """
    for site in sites:
        if not site.sigma:  # exact derivatives
            continue
        found, least = least_sigma(site, sites, clean)
        if found is not None and site.sigma < least < math.inf:  # logits may be masked with -inf
            warnings.warn(
                f"model.strategy.sites: sigma = {site.sigma:g} at site {site.name!r} is below what {found.name} "
                f"resolves there. Write {rounded_up(least):g} or more, or use a higher precision.",
                RuntimeWarning, stacklevel=3,
            )  # fmt: skip


def rounded_up(value: float) -> float:
    """The next number with two significant digits: with one, twice the value could be named."""
    step = 10.0 ** (math.floor(math.log10(value)) - 1) if value > 0 else 1.0
    return math.ceil(value / step) * step


@contextmanager
def differentiable(h: Tensor | Rows) -> Iterator[Any]:
    """``h`` for a pass that autograd follows, and the precision for it while the context lasts.

    That is the precision of the moment, but float32 where it is float16 by autocast: gradients there under- and
    overflow, and there is no loss scaler where there is no backward pass.
    """
    kind = h.device.type
    if not (torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16):
        yield h
        return
    with full_precision(value_of(h)):
        yield h.map(_float32_if_half) if isinstance(h, Rows) else at_least_float32(h)


def _float32_if_half(tensor: Tensor) -> Tensor:
    return at_least_float32(tensor) if tensor.is_floating_point() else tensor
