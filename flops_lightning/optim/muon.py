"""``Muon``: orthogonalised steps for hidden matrices, AdamW for all other parameters, in one optimiser.

Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/) replaces a matrix's gradient, or its momentum, by
the nearest matrix whose singular values are all about 1: with ``g = U S V^T``, the step is ``U V^T``. For estimates
from queries it has a second use: what a few random directions leave is mostly noise in how *long* the singular values
are (ZO-Muon, arXiv 2602.17155).

``torch.optim.Muon`` (torch 2.9 on) is the same rule with Newton-Schulz in bfloat16. The estimates of ``layout:
subspace`` have low rank, and five steps multiply what should be zero by ``3.44^5 = 485``, rounding errors of bfloat16
too; here they are float32, and any torch does.
"""

import math
from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Scale = Literal["rms", "original", "none"]
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Jordan et al.: the steepest rise at zero, for singular values between about 0.7 and 1.2 after five steps."""


class Muon(Optimizer):
    """Muon for the groups marked ``matrices: True``, AdamW for the others.

    For a matrix ``(m, n)`` (kernels of convolutions are flattened to one), with momentum ``mu`` and rate ``lr``::

        B = mu B + (1 - mu) g         O = newton_schulz((1 - mu) g + mu B)        W = (1 - lr decay) W - lr scale O

    Without ``nesterov`` it is ``newton_schulz(B)``, and without momentum ``newton_schulz(g)`` and no state.

    Example:
        >>> import torch
        >>> from flops_lightning.optim.muon import Muon
        >>> weight, bias = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(2))
        >>> groups = [{"params": [weight], "matrices": True}, {"params": [bias]}]
        >>> optimizer = Muon(groups, lr=1.0, scale="none")
        >>> weight.grad, bias.grad = torch.tensor([[5.0, 0.0], [0.0, 3.0]]), torch.tensor([5.0, 3.0])
        >>> optimizer.step()
        >>> bool((weight.diag() < -0.6).all()), bias.data.round()
        (True, tensor([-1., -1.]))
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        *, momentum: float = 0.0, nesterov: bool = True, weight_decay: float = 0.0, steps: int = 5,
        scale: Scale = "rms", adamw_ratio: float = 1.0, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
    ) -> None:  # fmt: skip
        """Keep the settings.

        Args:
            params: Groups; those of matrices have ``matrices: True``.
            lr: Learning rate.
            momentum: Momentum of the matrices; 0.95 is usual with exact gradients, 0 in ZO-Muon.
            nesterov: Orthogonalise a mean of momentum and gradient.
            weight_decay: Decoupled weight decay.
            steps: Steps of Newton-Schulz.
            scale: Factor of a matrix's step. ``rms``: ``0.2 sqrt(max(m, n))``, about the size of AdamW's steps, so that
                one rate suits both (Liu et al., 2025, arXiv 2502.16982). ``original``: ``sqrt(max(1, m / n))``.
                ``none``: 1.
            adamw_ratio: Learning rate of the other parameters over ``lr``.
            betas: Of AdamW.
            eps: Of AdamW.

        Raises:
            ValueError: a setting is out of range.
        """
        known = scale in get_args(Scale)
        for name, value, fits in (
            ("momentum", momentum, 0 <= momentum < 1), ("steps", steps, steps >= 1), ("scale", scale, known),
            ("adamw_ratio", adamw_ratio, adamw_ratio > 0), ("betas", betas, all(0 <= beta < 1 for beta in betas)),
        ):  # fmt: skip
            if not fits:
                raise ValueError(f"{name}={value!r} is out of range")
        of_all = {"weight_decay": weight_decay}
        matrix = {"momentum": momentum, "nesterov": nesterov, "steps": steps, "scale": scale}
        groups = []
        for group in params:
            rate, matrices = group.get("lr", lr), group.get("matrices", False)
            own = {"lr": rate, **matrix} if matrices else {"betas": tuple(betas), "eps": eps}
            groups.append({**of_all, **own, **group, "lr": rate * (1.0 if matrices else adamw_ratio)})
            groups[-1]["matrices"] = matrices
        super().__init__(groups, {"lr": lr, **of_all})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of all parameters that have a gradient; returns the loss of the closure, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            rule = self._orthogonal_step if group["matrices"] else self._adamw_step
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    rule(p, p.grad, self.state[p], group)
        return loss

    def _orthogonal_step(self, p: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        momentum, update = group["momentum"], grad
        if momentum:
            mean = state.setdefault("momentum_buffer", torch.zeros_like(grad)).lerp_(grad, 1 - momentum)
            update = grad.lerp(mean, momentum) if group["nesterov"] else mean
        update = newton_schulz(update.flatten(1), group["steps"])
        m, n = update.shape
        factor = {"rms": 0.2 * math.sqrt(max(m, n)), "original": math.sqrt(max(1.0, m / n)), "none": 1.0}
        p.add_(update.view_as(p).to(p.dtype), alpha=-group["lr"] * factor[group["scale"]])

    def _adamw_step(self, p: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        state["step"] += 1
        (beta1, beta2), step = group["betas"], state["step"].item()
        mean, square = state["exp_avg"].lerp_(grad, 1 - beta1), state["exp_avg_sq"]
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        length = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
        p.addcdiv_(mean, length, value=-group["lr"] / (1 - beta1**step))


def newton_schulz(matrix: Tensor, steps: int = 5) -> Tensor:
    """``(m, n)`` with the singular vectors of ``matrix`` and singular values near 1 (0 where they are 0), in float32.

    Each step is ``X = a X + b (X X^T) X + c (X X^T)^2 X``, an odd polynomial of the singular values: for ``P`` with
    orthonormal columns, ``newton_schulz(P G) = P newton_schulz(G)``. So a gradient in a subspace needs no rule of its
    own (ZO-Muon orthogonalises ``G``) as long as it, momentum included, lies in one.
    """
    a, b, c = COEFFICIENTS
    x = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    x = x / x.norm().clamp(min=1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def hidden_matrices(module: nn.Module) -> list[nn.Parameter]:
    """What Muon is made for: the trainable weights of linears and convolutions, less the last (the head).

    Parameters named ``...weight`` of two dimensions or more with several rows and columns count; embeddings do not.
    """
    embeddings = [m.weight for m in module.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    excluded = {id(p) for p in embeddings}
    named = module.named_parameters()
    weights = [p for name, p in named if name.endswith("weight") and p.ndim > 1 and id(p) not in excluded]
    return [p for p in weights[:-1] if p.requires_grad and min(len(p), p[0].numel()) > 1]
