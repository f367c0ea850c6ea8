"""Noise on images: its moments, what its draws depend on, and what is refused."""

import math

import pytest
import torch

from flops_lightning.errors import SettingError
from flops_lightning.robustness import Corruption, GaussianNoise, PoissonNoise, UniformNoise
from flops_lightning.robustness.corruptions import CORRUPTIONS

GREY = 0.4
KINDS = [GaussianNoise(0.05), UniformNoise(0.05), PoissonNoise(100)]
# Of a grey pixel: variance and excess kurtosis (a Poisson number's is 1 / rate).
MOMENTS = {"gaussian": (0.05**2, 0.0), "uniform": (0.05**2, -1.2), "poisson": (GREY / 100, 1 / (100 * GREY))}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_mean_and_variance_are_those_of_theory_where_nothing_is_clamped(kind: Corruption) -> None:
    grey = torch.full((16, 3, 40, 40), GREY)
    noise = (kind(grey, range(16), seed=2) - grey).double()
    variance, excess = MOMENTS[kind.name]
    n = noise.numel()
    assert abs(float(noise.mean())) < 4 * math.sqrt(variance / n)
    assert float(noise.square().mean()) == pytest.approx(variance, abs=4 * variance * math.sqrt((2 + excess) / n))
    # Pixels, channels and images are independent.
    for other in (noise.roll(1, 0), noise.roll(1, 1), noise.roll(1, 3)):
        assert abs(float((noise * other).mean())) < 4 * variance / math.sqrt(n)


def test_uniform_noise_of_equal_std_has_its_bound_at_the_root_of_three() -> None:
    grey = torch.full((4, 3, 64, 64), 0.5)
    largest = float((UniformNoise(0.1)(grey, range(4)) - grey).abs().max())
    assert largest == pytest.approx(0.1 * math.sqrt(3), rel=1e-3)
    assert largest < 0.1 * math.sqrt(3)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_noise_depends_on_seed_kind_and_image_and_on_nothing_else(kind: Corruption) -> None:
    torch.manual_seed(1)
    pixels = torch.rand(6, 3, 5, 5)
    index = [3, 0, 9, 4, 1, 7]
    whole = kind(pixels, index)
    before = torch.random.get_rng_state()
    for places in ([4], [5, 1], [2, 0, 3]):
        assert torch.equal(kind(pixels[places], [index[i] for i in places]), whole[places])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.equal(kind(pixels, index, seed=1), whole)
    assert not torch.equal(kind(pixels, index[::-1]), whole)
    assert 0 <= float(whole.min()) <= float(whole.max()) <= 1
    assert kind(pixels[:0], []).shape == (0, 3, 5, 5)


def test_severities_of_one_kind_share_their_draws_and_kinds_do_not() -> None:
    grey = torch.full((1, 1, 8, 8), 0.5)
    low, high = (GaussianNoise(std)(grey, [0]) - grey for std in (0.01, 0.03))
    assert torch.allclose(3 * low, high, atol=1e-6)
    uniform = UniformNoise(0.01)(grey, [0]) - grey
    assert abs(float(torch.corrcoef(torch.stack([low.flatten(), uniform.flatten()]))[0, 1])) < 4 / 8


def test_severities_go_from_gentle_to_those_of_imagenet_c() -> None:
    assert list(CORRUPTIONS) == ["gaussian", "uniform", "poisson"]
    assert GaussianNoise.severities[2:] == (0.08, 0.12, 0.18, 0.26, 0.38)
    assert PoissonNoise.severities[2:] == (60, 25, 12, 5, 3)
    for kind in CORRUPTIONS.values():
        grey = torch.full((1, 3, 32, 32), 0.5)
        spreads = [float((kind(each)(grey, [0]) - grey).square().mean()) for each in kind.severities]
        assert spreads == sorted(spreads)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianNoise(-0.1), "std = -0.1: must be 0 or more. Write for example 0.08"),
        (lambda: UniformNoise(math.inf), "std = inf: must be 0 or more"),
        (lambda: PoissonNoise(0), "photons = 0: must be a number above 0. Write the photons of a pixel of value 1"),
        (
            lambda: GaussianNoise(0.1)(torch.full((1, 1, 2, 2), -2.1), [0]),
            "pixels = '-2.1 to -2.1': pixels must lie in \\[0, 1\\]; these look normalised. Give images before",
        ),
    ],
)
def test_what_is_refused(make, message: str) -> None:
    with pytest.raises(SettingError, match=f"^{message}"):
        make()
