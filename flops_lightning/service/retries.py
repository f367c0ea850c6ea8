"""Which failures of a request are repeated, when, and which stop at once."""

import random
import threading
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any

from flops_lightning.errors import SettingError
from flops_lightning.service.settings import ServiceSettings

RETRIED = (408, 425, 429)
"""Statuses beside 5xx that say: later."""
LONGEST_WAIT = 600.0
"""Seconds; a server that wants to be left alone for longer is asked again after them."""
NAMED = {401: "token_env", 403: "token_env", 413: "max_rows"}
"""Settings to look at, by status; any other: the address."""


class Unanswered(RuntimeError):  # noqa: N818 -- no error where the next attempt succeeds
    """An attempt without an answer.

    Attributes:
        replied: The server was there, and said: later.
        waited: Seconds that the attempt took.
        later: Seconds after which the server wants to be asked again.
    """

    def __init__(self, what: str, *, replied: bool = False, waited: float = 0.0, later: float = 0.0) -> None:
        super().__init__(what)
        self.replied, self.waited, self.later = replied, waited, later


def patient(settings: ServiceSettings, attempts: int, stopped: threading.Event, count: Callable[[], None]) -> Any:
    """Repeats a call that raises :class:`Unanswered`, up to ``attempts`` times; ``count`` is told of each repetition.

    Waits double from ``settings.wait`` on, less a random part, so that many clients do not come back at once. A wait
    and the attempt before it take no longer than ``timeout`` together, unless the server's Retry-After says so: a
    server that is not there costs ``attempts`` times ``timeout`` at most.
    """
    import tenacity

    # Not Python's own generator, which belongs to the run.
    jitter = random.Random()

    def wait(state: Any) -> float:
        failed: Unanswered = state.outcome.exception()
        usual = settings.wait * 2.0 ** (state.attempt_number - 1) * jitter.uniform(0.5, 1.0)
        return max(min(failed.later, LONGEST_WAIT), min(usual, max(0.0, settings.timeout - failed.waited)))

    def sleep(seconds: float) -> None:
        if stopped.wait(seconds):
            raise Unanswered("another request was refused")
        count()

    return tenacity.Retrying(
        stop=tenacity.stop_after_attempt(attempts),
        wait=wait,
        sleep=sleep,
        retry=tenacity.retry_if_exception_type(Unanswered),
        reraise=True,
    )


def refused(response: Any, settings: ServiceSettings, waited: float) -> None:
    """Raise :class:`Unanswered` or a :class:`SettingError` for a response that is not 200.

    The message of the latter quotes the first line of what the server said, without the token.
    """
    status = int(response.status_code)
    if status == 200:
        return
    if status in RETRIED or status >= 500:
        later = _retry_after(response.headers.get("Retry-After"))
        raise Unanswered(f"status {status}", replied=True, waited=waited, later=later)
    lines = response.text.strip().splitlines()
    said, token = (lines[0][:300] if lines else "nothing"), settings.token()
    said = said.replace(token, "***") if token else said
    name = NAMED.get(status, "url")
    remedies = {
        "token_env": "Name the variable with a valid token.",
        "max_rows": "Write fewer rows a request.",
        "url": "Compare the server with docs/service.md.",
    }
    problem = f"the server refuses with status {status}: {said}."
    raise SettingError(f"service.{name}", getattr(settings, name), problem, remedies[name])


def _retry_after(told: str | None) -> float:
    """Seconds that a Retry-After header asks for, as a number or a date; 0 without a readable one."""
    if not told:
        return 0.0
    try:
        return max(0.0, float(told))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(told).timestamp() - time.time())
    except ValueError:
        return 0.0
