"""How wide the noise at a site is at present: its standard deviation, and how tokens differ in it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class SiteWidth:
    """Width of the noise at a site.

    Attributes:
        sigma: Standard deviation; a tensor where it carries a tangent.
        relative: ``(t,)`` relative widths ``r_t`` of the tokens, mean square 1: the activation moves by ``sigma r_t
            z_t``. None: all are 1.
    """

    sigma: float | Tensor
    relative: Tensor | None = None

    def scaled(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """``r z``, by which (times sigma) the activation moves, and ``z / r``, which carries the gradient.

        With ``w = (L - c) / sigma``, ``E w z_t / r_t`` is the derivative with respect to the activation at token t.

        Args:
            z: ``(r, t, d)`` noise, or ``(r, c, ...)`` at a feature map, whose positions are the tokens.
        """
        if self.relative is None:
            return z, z
        r = self._beside(z)
        return z * r, z / r

    def unscaled(self, direction: Tensor) -> Tensor:
        """The noise ``z`` itself, from ``z / r``."""
        return direction if self.relative is None else direction * self._beside(direction)

    def _beside(self, z: Tensor) -> Tensor:
        if self.relative is None:
            raise TypeError("all tokens have the same width.")
        relative = self.relative.to(z)
        return relative[:, None] if z.dim() == 3 else relative.view(z.shape[2:])


def by_token(x: Tensor) -> Tensor:
    """``(r, t, d)``: the tokens of ``(r, t, d)``, the positions of a feature map ``(r, c, ...)``, else one token."""
    if x.dim() == 3:
        return x
    return x.flatten(2).mT if x.dim() > 3 else x.reshape(len(x), 1, -1)
