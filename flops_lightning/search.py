"""Search by CMA-ES (N. Hansen, The CMA Evolution Strategy: A Tutorial, 2016), from losses of whole candidates.

A candidate is a vector of numbers, its fitness one loss, the smaller the better. Black-box prompt tuning (BPT-VLM,
BBT) learns prompts like this.
"""

import hashlib
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flops_lightning.errors import SettingError, check_flag, check_positive, check_whole, import_extra
from flops_lightning.settings import read_settings

__all__ = ["CMASearch", "SearchSettings"]
LEAST_POPULATION = 4
QUIET = {"verbose": -9, "verb_log": 0, "verb_disp": 0, "signals_filename": None}
"""Options of ``cma`` for no lines, no files and no commands from a file."""


@dataclass(frozen=True)
class SearchSettings:
    """Settings of CMA-ES; those of BPT-VLM by default.

    Attributes:
        population: Candidates per generation, at least 4.
        sigma: Standard deviation of the first generation's coordinates.
        diagonal: Use a diagonal covariance: a generation costs ``O(d)`` instead of ``O(d^2)`` operations, but
            correlations between coordinates are not learned.
        seed: Seed of the candidates, at least 1; None: the seed of ``seed_everything``.

    Example:
        >>> SearchSettings(seed=0).check()
        Traceback (most recent call last):
        ...
        flops_lightning.errors.SettingError: search.seed = 0: must be a whole number, 1 or more. Write 1 or more: ...
    """

    population: int = 30
    sigma: float = 1.0
    diagonal: bool = False
    seed: int | None = None

    def check(self) -> None:
        """Raise a :class:`SettingError` for a value out of range."""
        enough = f"Write {LEAST_POPULATION} or more, for example 30."
        check_whole("search.population", self.population, LEAST_POPULATION, enough)
        check_positive("search.sigma", self.sigma, "Write, for example, 1.0.")
        check_flag("search.diagonal", self.diagonal)
        if self.seed is not None:
            check_whole("search.seed", self.seed, 1, "Write 1 or more: 0 stands for the clock in the package cma.")
            if self.seed >= 2**32:
                raise SettingError("search.seed", self.seed, "is 2**32 or more.", "Write a smaller one.")


class CMASearch:
    """CMA-ES by the package ``cma``: ask for candidates, tell their fitnesses, and again.

    Its state is the fitnesses of all generations so far, plain numbers: a search that is loaded replays them, and goes
    on with the same bits. It draws from a generator of its own, and not from numpy's global one as ``cma`` does.

    Attributes:
        settings: With the seed that is used.

    Example:
        >>> import numpy as np
        >>> search = CMASearch(np.zeros(5), SearchSettings(population=8, seed=1))
        >>> for _ in range(60):
        ...     _ = search.tell([float(((candidate - 3) ** 2).sum()) for candidate in search.ask()])
        >>> bool(abs(search.mean - 3).max() < 0.1)
        True
    """

    def __init__(
        self, start: Sequence[float] | NDArray[np.float64], settings: SearchSettings | Mapping[str, Any] | None = None
    ) -> None:
        """Begin at ``start`` ``(d,)``, the mean of the first generation.

        Raises:
            SettingError: ``cma`` is not installed, a setting is out of range, or ``start`` is no vector of two finite
                numbers or more.
        """
        read = read_settings(SearchSettings, settings, "search")
        self._seed_given = read.seed is not None
        self.settings = read if self._seed_given else SearchSettings(**{**asdict(read), "seed": _usual_seed()})
        self._start = np.array(start, dtype=np.float64)
        if self._start.ndim != 1 or len(self._start) < 2 or not np.isfinite(self._start).all():
            problem = "is where the search begins; expected a vector of two finite numbers or more."
            raise SettingError("search", self._start.shape, problem, "Search in two dimensions or more.")
        self._begin()

    def _begin(self) -> None:
        self._fitness: list[list[float]] = []
        self._candidates: list[NDArray[np.float64]] | None = None
        options = {
            **QUIET, "popsize": self.settings.population, "CMA_diagonal": self.settings.diagonal,
            # Not its own seed, which would set numpy's global generator (and 0 be the clock).
            "seed": math.nan, "randn": np.random.RandomState(self.settings.seed).randn,
        }  # fmt: skip
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*is not a safe string")  # of one of its own defaults
            self._strategy = _cma().CMAEvolutionStrategy(self._start, self.settings.sigma, options)

    @property
    def generation(self) -> int:
        """Generations that were told."""
        return len(self._fitness)

    @property
    def mean(self) -> NDArray[np.float64]:
        """``(d,)`` mean of the next generation, the usual answer where fitnesses are noisy."""
        return np.array(self._strategy.mean)

    @property
    def best(self) -> tuple[NDArray[np.float64], float]:
        """The ``(d,)`` candidate of the smallest fitness so far, and that fitness; the start and infinity at first."""
        x = self._strategy.best.x
        return (self._start.copy(), math.inf) if x is None else (np.array(x), float(self._strategy.best.f))

    @property
    def finished(self) -> str:
        """Why ``cma`` would stop here (``tolx``, ``tolfun``, ...), or an empty string."""
        return ", ".join(self._strategy.stop())

    def ask(self) -> NDArray[np.float64]:
        """``(population, d)`` candidates, the same until their fitnesses are told."""
        if self._candidates is None:
            self._candidates = self._strategy.ask()
        return np.array(self._candidates)

    def tell(self, fitness: Sequence[float]) -> bool:
        """Learn from the fitnesses of :meth:`ask`'s candidates, in their order.

        A fitness that is not finite was lost, which says nothing of the candidate: it counts as the median of the
        others.

        Returns:
            Whether anything was learned: not if all were lost.

        Raises:
            ValueError: there is not one for each candidate.
        """
        told = [float(each) for each in fitness]
        if len(told) != self.settings.population:
            raise ValueError(f"{len(told)} fitnesses were told of {self.settings.population} candidates.")
        self.ask()
        candidates, self._candidates = self._candidates, None
        self._fitness.append(told)
        known = [each for each in told if math.isfinite(each)]
        if not known:
            return False
        middle = float(np.median(known))
        self._strategy.tell(candidates, [each if math.isfinite(each) else middle for each in told])
        return True

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers from which :meth:`load_state_dict` goes on."""
        return {
            "settings": asdict(self.settings), "start": self._start.tolist(), "fitness": [*map(list, self._fitness)],
            "mean": self._digest(), "versions": _versions(),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replay the generations that :meth:`state_dict` saved.

        Raises:
            SettingError: that search had other settings or another start, or the replay does not end where it did.
        """
        own = asdict(self.settings)
        for name, value in state["settings"].items():
            if value != own[name] and (name != "seed" or self._seed_given):
                problem = f"the search that was saved had {value!r}."
                raise SettingError(f"search.{name}", own[name], problem, "Resume with its settings, or start anew.")
        if state["start"] != self._start.tolist():
            problem = f"begins elsewhere than the search that was saved, in {len(state['start'])} dimensions."
            remedy = "Resume with the same start, or start anew."
            raise SettingError("search", f"{len(self._start)} dimensions", problem, remedy)
        self.settings = SearchSettings(**state["settings"])
        self._begin()
        for fitness in state["fitness"]:
            self.tell(fitness)
        if self._digest() != state["mean"]:
            problem = f"does not repeat with {_versions()} what it did with {state['versions']}."
            raise SettingError("search", f"{self.generation} generations", problem, "Install those versions to resume.")

    def _digest(self) -> str:
        return hashlib.sha256(self.mean.tobytes()).hexdigest()


def _usual_seed() -> int:
    return torch.initial_seed() % (2**31 - 1) + 1  # never 0


def _cma() -> Any:
    return import_extra("cma", extra="cma", setting="search", value="CMA-ES")


def _versions() -> str:
    return f"cma {_cma().__version__} and numpy {np.__version__}"
