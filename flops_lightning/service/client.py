"""Many small requests to one server: a pool of connections, retries, answers in order, NaN for what was lost.

It knows nothing of what is asked: a payload is a mapping, and an answer holds ``rows`` and ``values``.
"""

import hashlib
import json
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import quote

import torch
from torch import Tensor

from flops_lightning.errors import SettingError
from flops_lightning.meter import CLEAN
from flops_lightning.noise.keys import NoiseKey
from flops_lightning.service.payload import checked_rows
from flops_lightning.service.retries import Unanswered, patient, refused
from flops_lightning.service.settings import ServiceSettings
from flops_lightning.service.usage import Usage

CLEAN_PATIENCE = 2
"""Attempts of a clean evaluation, in those of a query: without it all queries of its sample are for nothing."""
ROUNDS = 3
"""How often a server may say that it lacks what was sent to it."""
Payload = Callable[[slice], Mapping[str, Any]]
"""The request for some of the rows."""
Info = TypeVar("Info")


class ServiceClient:
    """Asks a server for rows.

    Attributes:
        settings: Address, pool and retries.
        usage: What was asked so far.

    Example:
        >>> client = ServiceClient(ServiceSettings(url="http://localhost:8000", connections=16))
        >>> client.usage.calls  # nothing is sent before the first question
        0
    """

    def __init__(self, settings: ServiceSettings) -> None:
        """Check the settings and read the token.

        Raises:
            SettingError: a setting that cannot work, or no token in the variable that ``token_env`` names.
        """
        settings.check()
        settings.token()
        self.settings, self.usage = settings, Usage()
        self._http: Any = None
        self._pool: ThreadPoolExecutor | None = None
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self._place, self._first = NoiseKey(0, -1, CLEAN), 0  # outside of a step, as in validation
        self._silent_since: int | None = None  # the draw in which the server stopped to answer

    def __getstate__(self) -> dict[str, Any]:
        """Everything but connections and locks, which stay in their process."""
        kept = {"settings": self.settings, "usage": self.usage, "_place": self._place, "_first": self._first}
        return {**kept, "_silent_since": self._silent_since}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Start without connections."""
        self.__dict__.update(state)
        self._http = self._pool = None
        self._lock, self._stopped = threading.Lock(), threading.Event()

    def __deepcopy__(self, memo: Any) -> "ServiceClient":
        """Itself: copies of a network ask the same server, and what they spend is counted once."""
        return self

    def close(self) -> None:
        """Close the connections; the next question opens new ones."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        if self._http is not None:
            self._http.close()
        self._http = self._pool = None

    @contextmanager
    def rows_of(self, key: NoiseKey) -> Iterator[None]:
        """Ask for rows of this key (site ``clean``: unperturbed ones, with twice the attempts) while it lasts."""
        before, self._place, self._first = (self._place, self._first), key, 0
        try:
            yield
        finally:
            self._place, self._first = before

    def info(self) -> dict[str, Any]:
        """What the server tells of itself.

        Raises:
            SettingError: it does not answer, or with something else than JSON.
        """
        try:
            return self._attempts("GET", "/info", None, {}, self.settings.attempts)
        except Unanswered as error:
            problem = f"does not answer: {error}."
            raise SettingError("service.url", self.settings.url, problem, "Start the server, or correct it.") from error

    def read_info(self, read: Callable[[Any], Info], what: str, remedy: str) -> Info:
        """What the server tells of its model, read.

        Args:
            read: Reads it; a TypeError, ValueError or AttributeError says that it tells something else.
            what: What it should tell of.
            remedy: What to do otherwise.

        Raises:
            SettingError: it does not answer, or tells something else.
        """
        told = self.info()
        try:
            return read(told.get("model", told))
        except (TypeError, ValueError, AttributeError) as error:
            problem = f"tells nothing of {what} at /info: {error}."
            raise SettingError("service.url", self.settings.url, problem, remedy) from error

    def rows(
        self, payload: Payload, count: int, shape: Sequence[int], *, largest: int,
        cost: Callable[[int], Mapping[str, int]] = lambda rows: {"rows": rows},
        supply: Callable[[Sequence[Any]], bool] = lambda _: False,
    ) -> Tensor:  # fmt: skip
        """Ask for ``count`` rows, ``largest`` in a request.

        Args:
            payload: Makes the request for a slice of the rows; ``rows`` is added to it.
            count: Number of rows ``r``.
            shape: Shape of a row's values.
            largest: Most rows of a request.
            cost: What a request of so many rows adds to :class:`Usage` when it is first sent.
            supply: Hands over what the server says is ``missing`` (one value for each answer that does); whether it
                has arrived.

        Returns:
            ``(r, *shape)`` float32, NaN in the rows that were lost.

        Raises:
            SettingError: the server refuses, or its answer does not fit the question.
        """
        slices = [slice(i, min(i + largest, count)) for i in range(0, count, largest)]
        # Numbered through within a site of a step, so that a row keeps its number when it is asked for again.
        numbered = [list(range(self._first + s.start, self._first + s.stop)) for s in slices]
        self._first += count
        requests = [
            Request(lambda s=s, n=n: {**payload(s), "rows": n}, n[0], cost(len(n)))  # type: ignore[misc]
            for s, n in zip(slices, numbered, strict=True)
        ]
        answers = self.ask(requests, supply)
        values = torch.full((count, *shape), torch.nan)
        for answer, place, numbers in zip(answers, slices, numbered, strict=True):
            if answer is not None:
                try:
                    values[place] = checked_rows(answer, numbers, shape)
                except ValueError as error:
                    raise self._no_answer(str(error)) from error
        return values

    def ask(
        self, requests: Sequence["Request"], supply: Callable[[Sequence[Any]], bool] = lambda _: False
    ) -> list[dict[str, Any] | None]:
        """The answers in the order of the requests; None for those that were given up."""
        answers, arrived = self._send(requests), True
        for _ in range(ROUNDS):
            lacking = {i: a["missing"] for i, a in enumerate(answers) if a is not None and "missing" in a}
            if not lacking:
                return answers
            arrived = supply(list(lacking.values()))
            for i, again in zip(lacking, self._send([requests[i] for i in lacking]), strict=True):
                answers[i] = again
        if arrived and any(a is not None and "missing" in a for a in answers):
            raise self._no_answer("it lacks what was just sent to it")
        return [None if a is None or "missing" in a else a for a in answers]

    def _send(self, requests: Sequence["Request"]) -> list[dict[str, Any] | None]:
        """The answers in order, each after up to ``attempts`` attempts."""
        started, failed = time.monotonic(), self.usage.failed
        attempts = self.settings.attempts * (CLEAN_PATIENCE if self._place.site == CLEAN else 1)
        if self._silent_since == self._place.draw >= 0:
            attempts = 1  # one of this step's calls has waited for the server already
        state = _Sending(self._place)
        pool = self._opened()
        futures = [pool.submit(self._one, request, attempts, state) for request in requests]
        try:
            answers = [future.result() for future in futures]
        except BaseException:
            self._cancel(futures)
            raise
        finally:
            self.usage.add(seconds=time.monotonic() - started)
        self._silent_since = self._place.draw if state.silent else None if state.answered else self._silent_since
        lost = sum(answer is None for answer in answers)
        if lost:
            told = f"{lost} of {len(answers)} requests to {self.settings.url} got no answer"
            given_up = f"{self.usage.failed - failed} were given up after {attempts} attempts"
            warnings.warn(f"service: {told}; {given_up}, the last one: {state.last}.", RuntimeWarning, stacklevel=4)
        return answers

    def _one(self, request: "Request", attempts: int, state: "_Sending") -> dict[str, Any] | None:
        if state.silent:  # nobody is there: the others would only wait as long
            return None
        self._count(**request.cost)
        request.cost = {}
        payload = json.dumps(request.payload()).encode()
        place = state.place
        # The content belongs to it: the same place may be asked about other prompts, after a change of settings.
        parts = (place.seed, place.draw, quote(place.site), place.rank, request.first)
        key = "-".join(map(str, (*parts, hashlib.sha256(payload).hexdigest()[:16])))
        try:
            answer = self._attempts("POST", "/score", payload, {"Idempotency-Key": key}, attempts)
        except Unanswered as error:
            state.last = error
            state.silent |= not (error.replied or state.answered)
            return None
        state.answered = True
        return answer

    def _attempts(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], attempts: int
    ) -> dict[str, Any]:
        """One request, repeated until it is answered (:class:`Unanswered` otherwise)."""
        self._opened()
        retrying = patient(self.settings, attempts, self._stopped, lambda: self._count(retries=1))
        try:
            return retrying(self._attempt, method, path, body, headers)
        except Unanswered:
            self._count(failed=1)
            raise

    def _attempt(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> dict[str, Any]:
        import httpx

        self._count(calls=1)
        started = time.monotonic()
        try:
            response = self._http.request(method, path, content=body, headers=headers)
        except httpx.RequestError as error:
            waited = time.monotonic() - started
            raise Unanswered(f"{type(error).__name__} {error}".strip(), waited=waited) from error
        refused(response, self.settings, time.monotonic() - started)
        try:
            answer = response.json()
        except ValueError as error:
            raise self._no_answer("it is no JSON") from error
        if not isinstance(answer, dict):
            raise self._no_answer("it is no mapping")
        return answer

    def _count(self, **amounts: int) -> None:
        with self._lock:
            self.usage.add(**amounts)

    def _opened(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._http = self.settings.connect()
            self._pool = ThreadPoolExecutor(self.settings.connections, thread_name_prefix="service")
        return self._pool

    def _cancel(self, futures: Sequence["Future[Any]"]) -> None:
        self._stopped.set()  # wakes those that wait for their next attempt
        for future in futures:
            future.cancel()
        for future in futures:
            if not future.cancelled():
                future.exception()
        self._stopped.clear()

    def _no_answer(self, problem: str) -> SettingError:
        remedy = "Compare the server with docs/service.md, and the version of both."
        return SettingError("service.url", self.settings.url, f"gave an answer that is none: {problem}.", remedy)


@dataclass(eq=False)
class Request:
    """Some rows of a question; the payload is made when it is sent, and ``cost`` counted once."""

    payload: Callable[[], Mapping[str, Any]]
    first: int = 0
    cost: Mapping[str, int] = field(default_factory=dict)


class _Sending:
    """What the requests of one question know of each other."""

    def __init__(self, place: NoiseKey) -> None:
        self.place, self.answered, self.silent = place, False, False
        self.last: Unanswered | None = None
