"""A prompt of few numbers: ``p = p0 + reshape(z W)``, with a frozen random ``W`` (FLOPS, Ren et al., 2025, C.2)."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from flops_lightning.errors import SettingError, check_choice, check_positive, check_whole

Coordinates = Literal["flat", "by_token"]


@dataclass
class PromptSpec:
    """Setting: the size of a prompt and where it starts.

    Attributes:
        tokens: Number of prompt tokens ``n``.
        dim: Number of trained numbers: of the whole prompt (``flat``), or of each token (``by_token``).
        coordinates: ``flat``: one vector ``z`` for all tokens, as in BPT-VLM. ``by_token``: one for each token, the
            ``z in R^(m x d)`` of the paper.
        init: Where the prompt starts, ``p0``. ``data``: at the words of the template before the class name, or, for an
            image prompt, at the mean patch token. ``zeros``.
        seed: Seed of ``W``, from 0 to 2**31 - 1. Text and image prompts with the same seed draw different numbers.

    Example:
        >>> PromptSpec(tokens=4, dim=8).coordinates
        'flat'
        >>> PromptSpec(tokens=0)
        Traceback (most recent call last):
        flops_lightning.errors.SettingError: prompt.tokens = 0: must be a whole number, 1 or more. Leave the prompt ...
    """

    tokens: int = 12
    dim: int = 500
    coordinates: Coordinates = "flat"
    init: Literal["data", "zeros"] = "data"
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole("prompt.tokens", self.tokens, 1, "Leave the prompt out to have none.")
        check_whole("prompt.dim", self.dim, 1, "Write, for example, 500.")
        check_choice("prompt.coordinates", self.coordinates, get_args(Coordinates))
        check_choice("prompt.init", self.init, ("data", "zeros"))
        check_whole("prompt.seed", self.seed, 0, "Write, for example, 0.")
        if self.seed >= 2**31:
            raise SettingError("prompt.seed", self.seed, "is 2**31 or more.", "Write a smaller one.")


class IntrinsicPrompt(nn.Module):
    """Prompt tokens that depend linearly on a small vector ``z``, the only parameter; it starts at zero.

    ``W`` is Gaussian with the standard deviation ``std / sqrt(dim)``: a step of one in every coordinate of ``z`` moves
    the tokens as far as they are from each other. ``p0`` and ``W`` are buffers, so checkpoints hold them.

    Attributes:
        z: ``(dim,)``, or ``(n, dim)`` where each token has its own.
        start: ``(n, w)`` tokens at ``z = 0``.
        directions: ``(dim, n w)``, or ``(dim, w)``: the matrix ``W``.

    Example:
        >>> prompt = IntrinsicPrompt(torch.zeros(4, 16), PromptSpec(tokens=4, dim=8), std=0.02)
        >>> prompt().shape, sum(p.numel() for p in prompt.parameters())
        (torch.Size([4, 16]), 8)
    """

    def __init__(self, start: Tensor, spec: PromptSpec, *, std: float, seed_offset: int = 0) -> None:
        """Draw ``W``.

        Args:
            start: ``(n, w)`` tokens at ``z = 0``.
            spec: Numbers, coordinates and seed; its ``tokens`` are those of ``start``.
            std: Standard deviation of the tokens beside which the prompt stands.
            seed_offset: Added to the seed, so that several prompts of one seed have a ``W`` of their own.

        Raises:
            SettingError: more numbers than the tokens have, or tokens without any spread.
        """
        super().__init__()
        tokens, width = start.shape
        whole = spec.coordinates == "flat"
        most = tokens * width if whole else width
        if tokens != spec.tokens:
            raise SettingError("prompt.tokens", spec.tokens, f"but the start has {tokens} tokens.", f"Write {tokens}.")
        if spec.dim > most:
            raise SettingError(
                "prompt.dim", spec.dim, f"is more than the {most} numbers of "
                + (f"{tokens} tokens of width {width}." if whole else f"a token of width {width}."),
                f"Write {most} or less, or more tokens." if whole else f"Write {most} or less.",
            )  # fmt: skip
        check_positive("prompt.std", std, "Give the spread of the tokens beside which the prompt stands.")
        self.flat = whole
        generator = torch.Generator().manual_seed(spec.seed + seed_offset)
        drawn = torch.randn(spec.dim, most, generator=generator) * (std / spec.dim**0.5)
        self.z = nn.Parameter(start.new_zeros(spec.dim if whole else (tokens, spec.dim), dtype=torch.float32))
        self.start: Tensor
        self.directions: Tensor
        self.register_buffer("start", start.detach().float().clone())
        self.register_buffer("directions", drawn.to(start.device))

    def forward(self) -> Tensor:
        """``(n, w)`` tokens; ``(r, n, w)`` where ``z`` is replaced by one for each of ``r`` rows."""
        moved = self.z @ self.directions
        return self.start + (moved.unflatten(-1, self.start.shape) if self.flat else moved)
