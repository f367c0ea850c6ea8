# ruff: noqa: NPY002 - numpy's global generator is what others draw from
"""CMA-ES: it minimises, repeats itself after a resume, leaves numpy's generator alone, and refuses what cannot work."""

import io
import json
import math
import sys

import numpy as np
import pytest
import torch

from flops_lightning.errors import SettingError
from flops_lightning.search import CMASearch, SearchSettings

cma = pytest.importorskip("cma")
SETTINGS = SearchSettings(population=6, sigma=0.5, seed=3)


def fitness(candidates: np.ndarray) -> list[float]:
    """An ellipsoid with axes of different lengths, which are not the coordinates'."""
    scale = np.logspace(0, 1, candidates.shape[1])
    return ((candidates.cumsum(1) - 1) ** 2 * scale).sum(1).tolist()


def run(search: CMASearch, generations: int) -> CMASearch:
    for _ in range(generations):
        search.tell(fitness(search.ask()))
    return search


@pytest.mark.filterwarnings("ignore:.*is not a safe string")
@pytest.mark.parametrize("diagonal", [False, True])
def test_steps_are_those_of_the_package(diagonal: bool) -> None:
    ours = run(CMASearch(np.zeros(4), SearchSettings(population=6, sigma=0.5, diagonal=diagonal, seed=3)), 5)
    state = np.random.get_state()
    options = {"seed": 3, "popsize": 6, "verbose": -9, "CMA_diagonal": diagonal}
    theirs = cma.CMAEvolutionStrategy(np.zeros(4), 0.5, options)
    for _ in range(5):
        candidates = theirs.ask()
        theirs.tell(candidates, fitness(np.array(candidates)))
    np.random.set_state(state)
    assert np.array_equal(ours.mean, theirs.mean)
    assert ours.best[1] == theirs.best.f
    assert ours.generation == 5


def test_it_minimises() -> None:
    search = CMASearch(np.zeros(6), {"population": 12, "sigma": 0.5, "seed": 1})
    assert search.best[1] == math.inf
    run(search, 150)
    assert np.allclose(search.mean, [1, 0, 0, 0, 0, 0], atol=1e-4)
    assert search.best[1] < 1e-6
    run(search, 150)
    assert "tolfun" in search.finished


@pytest.mark.parametrize("given", [SETTINGS, SearchSettings(population=6, seed=None)])
def test_a_resumed_search_goes_on_with_the_same_bits_from_plain_numbers(given: SearchSettings) -> None:
    torch.manual_seed(5)
    first = run(CMASearch(np.full(8, 0.1), given), 7)
    first.ask()  # drawn, not told
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert json.loads(json.dumps(saved)) == saved
    torch.manual_seed(6)
    np.random.seed(11)
    second = CMASearch(np.full(8, 0.1), given)
    second.load_state_dict(saved)
    assert np.array_equal(second.ask(), first.ask())
    for search in (first, second):
        run(search, 6)
    assert np.array_equal(second.ask(), first.ask())
    assert np.array_equal(second.mean, first.mean)
    assert second.state_dict() == first.state_dict()


def test_numpys_global_generator_is_as_it_was() -> None:
    np.random.seed(7)
    expected = np.random.RandomState(7).rand(3).tolist()
    search = run(CMASearch(np.zeros(4), SETTINGS), 3)
    CMASearch(np.zeros(4), SETTINGS).load_state_dict(search.state_dict())
    assert np.random.rand(3).tolist() == expected


def test_candidates_depend_on_the_seed_and_not_on_what_others_draw() -> None:
    first, other = CMASearch(np.zeros(4), SETTINGS), CMASearch(np.zeros(4), SearchSettings(population=6, seed=4))
    drawn = first.ask()
    assert not np.array_equal(drawn, other.ask())
    assert np.array_equal(first.ask(), drawn)
    again = CMASearch(np.zeros(4), SETTINGS)
    np.random.rand(5)
    assert np.array_equal(again.ask(), drawn)
    first.tell(fitness(drawn))
    np.random.rand(5)
    again.tell(fitness(drawn))
    assert np.array_equal(first.ask(), again.ask())


def test_lost_fitnesses_count_as_the_median_and_a_lost_generation_teaches_nothing() -> None:
    lost, filled = CMASearch(np.zeros(4), SETTINGS), CMASearch(np.zeros(4), SETTINGS)
    values = fitness(lost.ask())
    assert lost.tell([math.nan, math.inf, *values[2:]])
    filled.tell([*[float(np.median(values[2:]))] * 2, *values[2:]])
    assert np.array_equal(lost.mean, filled.mean)
    before, drawn = lost.mean, lost.ask()
    assert not lost.tell([math.nan] * 6)
    assert np.array_equal(lost.mean, before)
    assert not np.array_equal(lost.ask(), drawn)
    again = CMASearch(np.zeros(4), SETTINGS)
    again.load_state_dict(lost.state_dict())
    assert np.array_equal(again.ask(), lost.ask())
    with pytest.raises(ValueError, match="5 fitnesses were told of 6 candidates"):
        lost.tell([0.0] * 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 0}, r"search.seed = 0: must be a whole number, 1 or more. .*0 stands for the clock"),
        ({"seed": 2**32}, r"search.seed = 4294967296: is 2\*\*32 or more"),
        ({"population": 3}, r"search.population = 3: must be a whole number, 4 or more"),
        ({"sigma": 0.0}, r"search.sigma = 0.0: must be a number above 0"),
        ({"diagonal": "yes"}, r"search.diagonal = 'yes': must be true or false"),
        ({"popsize": 30}, r"search = .*has no setting 'popsize'. Choose from population"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(SettingError, match=f"^{message}"):
        CMASearch(np.zeros(4), settings)


@pytest.mark.parametrize("start", [[0.0], [[0.0, 0.0]], [0.0, math.nan]])
def test_a_start_that_is_no_vector_is_refused(start: list) -> None:
    with pytest.raises(SettingError, match=r"search = \(.*vector of two finite numbers or more"):
        CMASearch(start, SETTINGS)


def test_a_search_of_other_settings_start_or_versions_is_not_resumed() -> None:
    saved = run(CMASearch(np.zeros(4), SETTINGS), 2).state_dict()
    for start, settings, message in (
        (np.zeros(4), {"population": 6, "sigma": 0.5, "seed": 4}, r"search.seed = 4: the search that was saved had 3"),
        (np.zeros(4), {"population": 8, "sigma": 0.5}, r"search.population = 8: the search that was saved had 6"),
        (np.zeros(5), SETTINGS, r"search = '5 dimensions': begins elsewhere .* in 4 dimensions"),
        (np.ones(4), SETTINGS, r"search = '4 dimensions': begins elsewhere .*Resume with the same start"),
    ):
        with pytest.raises(SettingError, match=message):
            CMASearch(start, settings).load_state_dict(saved)
    other = {**saved, "mean": "0", "versions": "cma 3.2 and numpy 1.26"}
    with pytest.raises(SettingError, match=r"2 generations': does not repeat .*cma 3.2.*Install those versions"):
        CMASearch(np.zeros(4), SETTINGS).load_state_dict(other)


def test_without_the_package_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cma", None)
    with pytest.raises(SettingError, match=r"needs the package cma .*Run pip install .*\[cma\]"):
        CMASearch(np.zeros(4), SETTINGS)
