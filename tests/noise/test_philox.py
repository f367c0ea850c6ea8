"""Philox-4x32-10: the published known answers, keyed rows, and the distribution of normals and signs."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from flops_lightning.errors import SettingError
from flops_lightning.noise import philox
from flops_lightning.noise.generators import GeneratorChoice, generator_on
from flops_lightning.noise.keys import NoiseKey, normal_rows, row_keys, row_seeds
from flops_lightning.noise.kinds import draw_noise
from tests.reference.layouts import NOISES as KINDS

CPU = torch.device("cpu")
KEY = NoiseKey(seed=3, draw=5, site="blocks.1", generator="philox")
# "kat_vectors" of Random123, the authors' library: counter, key, answer.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def assert_mean(draws: Tensor, expected: Tensor | float, errors: float = 5) -> None:
    """``draws`` ``(n, ...)`` average to ``expected`` within so many standard errors."""
    error = draws.std(0) / len(draws) ** 0.5
    assert bool(((draws.mean(0) - expected).abs() <= errors * error).all())


def keys_of(rows: int) -> Tensor:
    places = np.arange(rows)
    return torch.from_numpy(row_keys(KEY, places // 20, places % 20))


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_published_answers(counter, key, answer):
    numbers = [torch.tensor([int(word, 16)]) for word in (counter + " " + key).split()]
    found = philox.philox4x32(tuple(numbers[:4]), tuple(numbers[4:]))
    assert " ".join(f"{int(word):08x}" for word in found) == answer


def test_key_counter_and_stream_are_where_the_docstring_says():
    key = int.from_bytes(bytes.fromhex("299f31d0a4093822"), "big")  # the high word, then the low one
    place, stream = torch.tensor([7]), torch.tensor([1])
    expected = philox.philox4x32(
        (place, 0 * place, stream, 0 * place), (torch.tensor([0xA4093822]), torch.tensor([0x299F31D0]))
    )
    found = philox.random_words(torch.tensor([key]), 32, stream=1)
    assert [int(words[0, 7]) for words in found] == [int(word) for word in expected]


def test_seeds_of_torchs_generator_are_the_upper_halves_of_the_keys_and_what_they_always_were():
    rows = np.array([0, 3]), np.array([1, 7])
    assert row_seeds(KEY, *rows) == [922264093, 2988473855]
    assert [(key >> 32) & 0xFFFFFFFF for key in row_keys(KEY, *rows).tolist()] == row_seeds(KEY, *rows)


@pytest.mark.parametrize("size", [1, 3, 4, 5, 1001])
def test_entries_do_not_depend_on_how_many_are_drawn(size):
    keys = keys_of(3)
    whole = philox.normals(keys, 1002, torch.float32)
    torch.testing.assert_close(philox.normals(keys, size, torch.float32), whole[:, :size], rtol=0, atol=0)
    one_by_one = torch.cat([philox.normals(key, size, torch.float32) for key in keys.split(1)])
    torch.testing.assert_close(one_by_one, whole[:, :size], rtol=0, atol=0)


def test_float64_has_the_same_numbers():
    keys = keys_of(40)
    single, double = (philox.normals(keys, 5000, dtype) for dtype in (torch.float32, torch.float64))
    torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=5e-4)  # near 0, where log u is rounded
    assert float((single - double).abs().mean()) < 2e-7


def test_moments_of_normals():
    """Of rows, the mean of the products of an entry, and with its neighbours, those of the other words included."""
    z = philox.normals(keys_of(4000), 64, torch.float64)
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3), (6, 15)):
        assert_mean((z**power).mean(1), moment)
    for lag in (1, 2, 3, 4, 8):
        assert_mean((z[:, lag:] * z[:, :-lag]).mean(1), 0.0)
        assert_mean((z[:, lag:].square() * z[:, :-lag].square()).mean(1), 1.0)
    assert_mean((z[1:] * z[:-1]).mean(1), 0.0)  # neighbouring keys
    streams = philox.normals(keys_of(4000), 64, torch.float64, stream=1)
    assert_mean((z * streams).mean(1), 0.0)


def test_normals_have_the_normal_distribution():
    """Kolmogorov and Smirnov: the largest distance times sqrt(n) exceeds 1.95 with probability 0.001."""
    z = philox.normals(keys_of(500), 1000, torch.float32).double().flatten().sort().values
    n = len(z)
    expected = 0.5 * (1 + torch.erf(z / math.sqrt(2)))
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum((expected - steps[:-1]).abs().max(), (steps[1:] - expected).abs().max())
    assert float(distance) * math.sqrt(n) < 1.95
    beyond = float((z.abs() > 4).double().mean())
    assert beyond == pytest.approx(math.erfc(4 / math.sqrt(2)), abs=4 * math.sqrt(6.3e-5 / n))


def test_every_bit_of_the_words_is_fair_and_the_largest_normal_is_as_said():
    words = torch.stack(philox.random_words(keys_of(1000), 400), dim=2).flatten()
    ones = ((words[:, None] >> torch.arange(32)) & 1).double()
    assert bool(((ones.mean(0) - 0.5).abs() < 5 * 0.5 / len(words) ** 0.5).all())
    smallest = torch.zeros(1, dtype=torch.int64)
    radius, _ = philox._box_muller(smallest, smallest, torch.float32)
    assert float(radius) == pytest.approx(math.sqrt(2 * 33 * math.log(2)))  # 6.76


def test_signs_are_fair_and_independent():
    signs = philox.signs(keys_of(2000), 64, torch.float64)
    torch.testing.assert_close(signs.abs(), torch.ones_like(signs), rtol=0, atol=0)
    assert_mean(signs, 0.0)
    for lag in (1, 2, 3, 4):
        assert_mean((signs[:, lag:] * signs[:, :-lag]).mean(1), 0.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 3)])
def test_every_kind_is_isotropic_and_a_function_of_its_key(kind, shape):
    samples, queries = np.arange(4000), np.arange(4000) % 7

    def draw(at: slice) -> Tensor:
        return draw_noise(KINDS[kind], KEY, samples[at], queries[at], shape, device=CPU, dtype=torch.float64)

    z = draw(slice(None))
    torch.testing.assert_close(draw(slice(9, 20)), z[9:20], rtol=0, atol=1e-11 if kind == "orthogonal" else 0)
    flat = z.flatten(1)
    products = flat[:, :, None] * flat[:, None]
    off = ~torch.eye(flat.shape[1], dtype=torch.bool)
    assert_mean(products[:, off], 0.0)
    torch.testing.assert_close(
        products.mean(0).diagonal(), torch.ones_like(flat[0]), rtol=0, atol=5 * (2 / 4000) ** 0.5
    )


def test_auto_is_torch_on_a_cpu_and_philox_elsewhere():
    assert [generator_on(torch.device(kind), "auto") for kind in ("cpu", "cuda", "mps")] == [
        "torch",
        "philox",
        "philox",
    ]
    rows, where = (np.arange(3), np.arange(3)), {"device": CPU, "dtype": torch.float32}
    drawn = [normal_rows(NoiseKey(1, 2, "head", 0, name), *rows, (9,), **where) for name in ("auto", "torch", "philox")]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.isclose(drawn[0], drawn[2]).any()


def test_a_run_goes_on_with_the_generator_that_it_began_with():
    with pytest.raises(SettingError, match=r"model.strategy.generator = 'mt19937'"):
        GeneratorChoice("mt19937")
    first = GeneratorChoice("auto")
    assert first.state_dict() == {}
    first.settle(CPU)
    assert first.state_dict() == {"generator": "torch on cpu"}
    for setting, device in (("auto", "cuda"), ("philox", "cpu"), ("torch", "cuda")):
        other = GeneratorChoice(setting)
        other.load_state_dict(first.state_dict())
        with pytest.raises(SettingError, match="drew its noise with torch on cpu, and would go on with"):
            other.settle(torch.device(device))
    on_gpu = GeneratorChoice("auto")
    on_gpu.settle(torch.device("cuda"))
    for setting, refused in (("auto", True), ("philox", False)):  # continued on a CPU
        other = GeneratorChoice(setting)
        other.load_state_dict(on_gpu.state_dict())
        if refused:
            with pytest.raises(SettingError, match=r"with philox, and .* torch on cpu\. Write generator: philox"):
                other.settle(CPU)
        else:
            other.settle(CPU)
    older = GeneratorChoice("auto")
    older.load_state_dict({})
    older.settle(CPU)
