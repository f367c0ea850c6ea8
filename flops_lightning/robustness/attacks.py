"""White-box attacks in pixel space, within ``eps`` of every pixel: FGSM, I-FGSM and MI-FGSM.

The attacker backpropagates through the finished network, however that was trained.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from flops_lightning.errors import SettingError, check_at_least, check_choice, check_positive, check_whole
from flops_lightning.robustness.pixels import check_pixels

STEPS = 5  # as in the paper
MOMENTUM = 1.0
ATTACKS = ("fgsm", "i_fgsm", "mi_fgsm")


@dataclass(frozen=True)
class AttackSettings:
    """An attack by name, untargeted and without a random start.

    Sources: I. Goodfellow et al., Explaining and Harnessing Adversarial Examples, 2015 (``fgsm``, one step of
    ``eps``); A. Kurakin et al., Adversarial Examples in the Physical World, 2017 (``i_fgsm``, several smaller ones);
    Y. Dong et al., Boosting Adversarial Attacks with Momentum, 2018 (``mi_fgsm``).

    Attributes:
        name: ``fgsm``, ``i_fgsm`` or ``mi_fgsm``.
        eps: Largest change of a pixel, as a share of the range of pixels, above 0 and at most 1.
        steps: Steps of the iterated attacks; None: 5.
        step_size: Change of a pixel in one step of these, at most ``eps``; None: ``eps / steps``.
        momentum: Weight of the earlier directions in ``mi_fgsm``; None: 1.0.

    Example:
        >>> import torch
        >>> from flops_lightning.robustness import AttackSettings
        >>> images, labels = torch.rand(2, 1, 4, 4), torch.tensor([0, 1])
        >>> moved = AttackSettings("mi_fgsm", eps=2 / 255).run(torch.nn.Flatten(), images, labels)
        >>> bool(((moved - images).abs() <= 2 / 255 + 1e-6).all())
        True
    """

    name: str
    eps: float = 8 / 255
    steps: int | None = None
    step_size: float | None = None
    momentum: float | None = None

    def check(self) -> None:
        """Raise a :class:`SettingError` for a value out of range, or a setting that the attack does not have."""
        check_choice("name", self.name, ATTACKS)
        check_eps(self.eps)
        own = {"fgsm": (), "i_fgsm": ("steps", "step_size"), "mi_fgsm": ("steps", "step_size", "momentum")}[self.name]
        for name in ("steps", "step_size", "momentum"):
            if getattr(self, name) is not None and name not in own:
                problem = f"{self.name} has no such setting."
                remedy = "Remove it, or choose mi_fgsm." if name == "momentum" else "Remove it, or choose i_fgsm."
                raise SettingError(name, getattr(self, name), problem, remedy)
        if self.name != "fgsm":
            _check_steps(self.eps, self._steps, self._step_size, self._momentum)

    @property
    def _steps(self) -> int:
        return 1 if self.name == "fgsm" else STEPS if self.steps is None else self.steps

    @property
    def _step_size(self) -> float:
        return self.eps / max(1, self._steps) if self.step_size is None else self.step_size

    @property
    def _momentum(self) -> float:
        given = MOMENTUM if self.momentum is None else self.momentum
        return given if self.name == "mi_fgsm" else 0.0

    def run(
        self, model: Callable[[Tensor], Tensor], pixels: Tensor, labels: Tensor, *, slope: Tensor | None = None
    ) -> Tensor:
        """The images under attack; see :func:`iterated_fgsm`."""
        self.check()
        return iterated_fgsm(
            model, pixels, labels, eps=self.eps, steps=self._steps, step_size=self._step_size, momentum=self._momentum,
            slope=slope,
        )  # fmt: skip


def iterated_fgsm(
    model: Callable[[Tensor], Tensor], pixels: Tensor, labels: Tensor, *, eps: float, steps: int = 1,
    step_size: float | None = None, momentum: float = 0.0, slope: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Move every pixel by steps along the sign of the gradient of cross-entropy, within ``eps`` and within [0, 1].

    ``x_{k+1} = clip(x_k + step_size sign(g_{k+1}))`` with ``g_{k+1} = momentum g_k + d_k / mean |d_k|``, where ``d_k``
    is the derivative of an image's loss at ``x_k``. One step is FGSM, several are I-FGSM, with a momentum MI-FGSM.

    Args:
        model: Logits ``(b, k)`` of pixels ``(b, c, h, w)``, in eval mode; the attack changes nothing in it.
        pixels: Images ``(b, c, h, w)`` in [0, 1], float.
        labels: True classes ``(b,)``.
        eps: Largest change of a pixel, above 0 and at most 1.
        steps: At least 1.
        step_size: At most ``eps``; None: ``eps / steps``.
        momentum: 0 or more.
        slope: What :func:`loss_slope` gives for these images, where several attacks share it; None: found here.

    Raises:
        SettingError: A setting is out of range, or the pixels do not lie in [0, 1].
    """
    check_eps(eps)
    check_whole("steps", steps, 1, "Write for example 5, or 1 for FGSM.")
    step_size = eps / steps if step_size is None else step_size
    _check_steps(eps, steps, step_size, momentum)
    check_pixels(pixels)
    start = pixels.detach()
    low, high = (start - eps).clamp(min=0), (start + eps).clamp(max=1)
    moved, direction = start, torch.zeros_like(start)
    for step in range(steps):
        if step or slope is None:
            slope = loss_slope(model, moved, labels)
        # An image whose gradient is zero stays where it is, or follows its momentum.
        size = slope.abs().mean(dim=(1, 2, 3), keepdim=True).clamp_min(torch.finfo(slope.dtype).tiny)
        direction = momentum * direction + slope / size
        moved = torch.clamp(moved + step_size * direction.sign(), low, high)
    return moved


def loss_slope(model: Callable[[Tensor], Tensor], pixels: Tensor, labels: Tensor) -> Tensor:
    """Derivative ``(b, c, h, w)`` of each image's cross-entropy."""
    with torch.enable_grad():
        at = pixels.detach().requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(model(at), labels, reduction="sum"), at)
    return slope


def check_eps(eps: float) -> None:
    """Raise a :class:`SettingError` unless ``eps`` is above 0 and at most 1; whole numbers look like 8 of 255."""
    remedy = "Write a share of the range of pixels, for example 0.0314 (8/255)."
    check_positive("eps", eps, remedy)
    if eps > 1:
        meant = f" Write {eps / 255:.4f} ({eps:g}/255)." if eps <= 255 else f" {remedy}"
        raise SettingError("eps", eps, "is read as a share of the range of pixels, which is 1.", meant.strip())


def _check_steps(eps: float, steps: int, step_size: float, momentum: float) -> None:
    check_whole("steps", steps, 1, "Write for example 5, or 1 for FGSM.")
    check_positive("step_size", step_size, "Write for example 0.0063 (1.6/255), or leave it out for eps / steps.")
    if step_size > eps * (1 + 1e-9):
        problem = f"is larger than eps = {eps:.4g}: every step would be cut off."
        raise SettingError("step_size", step_size, problem, "Write at most eps, or leave it out for eps / steps.")
    check_at_least("momentum", momentum, 0, "Write for example 1.0, or 0 for none.")
