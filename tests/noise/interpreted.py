"""``python -m tests.noise.interpreted PART ...``: kernels in Triton's interpreter beside the reference, as JSON.

A process of its own: Triton looks for ``TRITON_INTERPRET`` when it is imported.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from torch import Tensor

from flops_lightning.noise import generators, philox, philox_triton
from flops_lightning.noise.kinds import NoiseSpec
from flops_lightning.strategies import LikelihoodRatio
from flops_lightning.strategies.perturbation import moved
from flops_lightning.strategies.widths import SiteWidth
from tests.reference.networks import bound_to, cross_entropy, gradients, tiny_vit

philox_triton.BLOCK = 64  # so that small rows have several blocks: the interpreter is slow
KEYS = torch.from_numpy(np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 6))


def drawn(keys: Tensor, shape: tuple[int, ...], *, signs: bool) -> Tensor:
    draw = philox.signs if signs else philox.normals
    return draw(keys, int(np.prod(shape)), torch.float32).view(-1, *shape)


def words() -> Iterator[tuple[str, float]]:
    """How many words differ."""
    for size in (1, 64, 131):
        for stream in (0, 1):
            expected = torch.stack(philox.random_words(KEYS, size, stream), dim=2).flatten(1)[:, :size]
            yield f"{size}, stream {stream}", float((philox_triton.words(KEYS, size, stream) != expected).sum())


def draws() -> Iterator[tuple[str, float]]:
    """Largest difference of an entry."""
    for size in (1, 67):
        for signs in (False, True):
            found = philox_triton.draw(KEYS, size, signs=signs)
            yield f"{size}, signs {signs}", float((found - drawn(KEYS, (size,), signs=signs)).abs().max())


ADDED: dict[str, dict[str, Any]] = {
    "one number": {"shape": (1,)},
    "features": {"shape": (7,)},
    "tokens": {"shape": (5, 7)},
    "more than a block": {"shape": (9, 13)},
    "feature map": {"shape": (3, 5, 7)},
    "first token": {"shape": (5, 7), "tokens": slice(0, 1)},
    "all but the first": {"shape": (5, 7), "tokens": slice(1, None)},
    "in the middle": {"shape": (6, 6), "tokens": slice(2, 4)},
    "from the end": {"shape": (6, 6), "tokens": slice(-2, None)},
    "pairs": {"shape": (5, 7), "unit": 2},
    "signs": {"shape": (5, 7), "signs": True, "unit": 2},
    "widths": {"shape": (5, 7), "relative": 5},
    "widths of some tokens": {"shape": (5, 7), "tokens": slice(1, 4), "relative": 3, "unit": 2},
    "widths of a map": {"shape": (3, 2, 7), "relative": 14},
    "float16": {"shape": (5, 7), "dtype": torch.float16},
    "bfloat16": {"shape": (9, 13), "dtype": torch.bfloat16, "tokens": slice(1, None)},
    "a part of each sample": {"shape": (5, 7), "narrow": slice(1, 3)},
}


def relative_of(case: dict[str, Any]) -> Tensor | None:
    return torch.rand(case["relative"]) + 0.5 if "relative" in case else None


def added() -> Iterator[tuple[str, float]]:
    """Largest difference of an entry, over the rounding step of the dtype at the entry (or at 1, if that is larger)."""
    for name, case in ADDED.items():
        dtype, unit, signs, tokens = (
            case.get(key, default)
            for key, default in (("dtype", torch.float32), ("unit", 1), ("signs", False), ("tokens", None))
        )
        h = torch.randn(4, *case["shape"]).to(dtype)[:, case.get("narrow", slice(None))]
        index = torch.tensor([0, 0, 2, 2, 3, 3])  # the last two are padding, say; sample 1 has none
        relative = relative_of(case)
        before = h.clone()
        found = philox_triton.draw_and_add(
            h, index, KEYS[: 6 // unit], sigma=0.37, tokens=tokens, relative=relative, unit=unit, signs=signs
        )
        assert torch.equal(h, before), "the activation is not written to"
        rows = h.index_select(0, index)
        shape = tuple((rows if tokens is None else rows[:, tokens]).shape[1:])
        z = drawn(KEYS[: 6 // unit], shape, signs=signs)
        z = torch.stack((z, -z), 1).flatten(0, 1) if unit == 2 else z
        step, _ = SiteWidth(0.37, relative).scaled(z)
        expected = moved(rows, step, tokens, 0.37)
        assert found.dtype == expected.dtype
        size = expected.double().abs().clamp(min=1) * torch.finfo(dtype).eps
        yield name, float(((found.double() - expected.double()).abs() / size).max())


def accumulated() -> Iterator[tuple[str, float]]:
    """Largest difference of a sum, relative to the largest sum."""
    bounds = torch.tensor([0, 2, 2, 6])  # the sample in the middle has no row
    for name, case in ADDED.items():
        if "tokens" in case or "narrow" in case or "dtype" in case:
            continue
        shape, signs, relative = case["shape"], case.get("signs", False), relative_of(case)
        total = torch.randn(3, *shape)
        weights, square_weights = torch.randn(6), torch.rand(6)
        weights[-1] = square_weights[-1] = 0.0  # padding
        _, z = SiteWidth(1.0, relative).scaled(drawn(KEYS, shape, signs=signs).double())
        of = torch.block_diag(torch.ones(1, 2), torch.ones(1, 4)).double()
        of = torch.stack((of[0], 0 * of[0], of[1]))
        expected = total + (of * weights @ z.flatten(1)).view_as(total)
        squares = (of * square_weights @ z.flatten(1).square()).view_as(total)
        args = (KEYS, bounds, shape)
        kept = {"relative": relative, "signs": signs}
        found = philox_triton.draw_and_accumulate(
            *args, total=total, weights=weights, square_weights=square_weights, **kept
        )
        for what, one, other in (("sums", total, expected), ("squares", found, squares)):
            yield f"{name}, {what}", float((one - other).abs().max() / other.abs().max())
        if name == "widths":
            again = total.clone()
            assert philox_triton.draw_and_accumulate(*args, total=again, weights=-weights, **kept) is None
            yield "sums alone", float((again - total + (of * weights @ z.flatten(1)).view_as(total)).abs().max() / 10)
            again = philox_triton.draw_and_accumulate(*args, square_weights=square_weights, **kept)
            yield "squares alone", float((again - found).abs().max())


GROUPS = [
    {"name": "lower", "stages": ["embed", "blocks.0"], "sigma": 0.02, "queries_per_sample": 2},
    {
        "name": "upper",
        "stages": ["blocks.1", "blocks.2"],
        "sigma": 0.02,
        "queries_per_sample": 4,
    },  # its class token alone
    {"name": "head", "stages": ["pool", "head"], "sigma": 0.02, "queries_per_sample": 2},
]
FEW: dict[str, dict[str, Any]] = {
    "leave_one_out": {"variant": "leave_one_out"},
    "learned widths": {"token_sigma": True, "learn_sigma": 0.05, "variant": "antithetic", "chunk_rows": 8},
}
ALL: dict[str, dict[str, Any]] = {
    **FEW,
    "baseline": {},
    "antithetic": {"variant": "antithetic", "chunk_rows": 6},
    "signs": {"noise": NoiseSpec(distribution="rademacher"), "variant": "antithetic"},
    "learned, plain": {"learn_sigma": 0.05, "variant": "plain"},
    # Kernels do not know these: the same noise goes through memory.
    "factored": {"noise": NoiseSpec(layout="factored")},
    "orthogonal": {"noise": NoiseSpec(orthogonal=True)},
}


def few_estimates() -> Iterator[tuple[str, float]]:
    return estimates(FEW)


def estimates(strategies: dict[str, dict[str, Any]] = ALL) -> Iterator[tuple[str, float]]:
    """``||g - g'|| / ||g||`` of a second step's gradients and traces, with and without the kernels."""
    philox_triton.BLOCK = 128  # several blocks are tested above; here they only take time
    x, y = torch.randn(2, 1, 8, 8), torch.arange(2)
    for name, settings in strategies.items():
        found = []
        for without in (False, True):
            find = generators._kernels
            generators._kernels = (lambda _: None) if without else find
            torch.manual_seed(0)
            strategy = bound_to(
                LikelihoodRatio, tiny_vit().float(), cross_entropy, GROUPS,
                **{"chunk_rows": 7, "generator": "philox", **settings},
            )  # fmt: skip
            for _ in range(2):  # widths are those learned in the first
                gradients(strategy.network.module)
                estimate = strategy.estimate(strategy.clean_pass(x, y), traces=True)
            generators._kernels = find
            parts = [p.flatten() for p in gradients(strategy.network.module).values()]
            found.append((torch.cat(parts), torch.nan_to_num(estimate.observation.trace).flatten()))
        for what, one, other in zip(("gradient", "traces"), *found, strict=True):
            yield f"{name}, {what}", float((one - other).norm() / other.norm())


PARTS: dict[str, Callable[[], Iterator[tuple[str, float]]]] = {
    part.__name__: part for part in (words, draws, added, accumulated, few_estimates, estimates)
}


if __name__ == "__main__":
    torch.manual_seed(0)
    print(json.dumps({name: dict(PARTS[name]()) for name in sys.argv[1:]}))
