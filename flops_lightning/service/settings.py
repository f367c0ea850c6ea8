"""Where a service is and how it is asked."""

import os
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from flops_lightning.errors import SettingError, check_at_least, check_positive, check_whole, import_extra


@dataclass
class ServiceSettings:
    """Setting: a scoring service.

    Attributes:
        url: Its address; ``/info`` and ``/score`` are below it.
        connections: Requests at a time.
        max_rows: Most rows of a request; 0: as many as the server takes.
        timeout: Seconds until an attempt is given up. It must be longer than a queue of ``connections`` requests takes.
        attempts: Attempts of a request before its rows are lost; of clean evaluations twice as many.
        wait: Seconds before the second attempt, about; twice as many before each further one.
        token_env: Name of the environment variable with the token, if the server wants one.
        images_mb: Images that are kept to be sent again to a server that has lost them, in MiB.

    Example:
        >>> ServiceSettings(url="http://localhost:8000", attempts=8).connections
        8
        >>> ServiceSettings(url="ftp://localhost").check()
        Traceback (most recent call last):
        flops_lightning.errors.SettingError: service.url = 'ftp://localhost': is not the address of a web service. ...
    """

    url: str = ""
    connections: int = 8
    max_rows: int = 0
    timeout: float = 60.0
    attempts: int = 5
    wait: float = 0.25
    token_env: str = ""
    images_mb: int = 1024

    def check(self) -> None:
        """Raise a :class:`SettingError` for a setting that cannot work."""
        remedy = "Write, for example, http://localhost:8000."
        try:
            parts = urlsplit(self.url)
            fits = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            fits = False
        if not fits:
            raise SettingError("service.url", self.url, "is not the address of a web service.", remedy)
        if parts.username or parts.password:
            address = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
            problem = "holds a user or password, which would appear in logs."
            raise SettingError("service.url", address, problem, "Leave them out, and write token_env.")
        check_whole("service.connections", self.connections, 1, "Write 1 or more, for example 8.")
        check_whole("service.max_rows", self.max_rows, 0, "Write 0 for as many as the server takes.")
        check_positive("service.timeout", self.timeout, "Write seconds, for example 60.")
        check_whole("service.attempts", self.attempts, 1, "Write 1 for no repetition.")
        check_at_least("service.wait", self.wait, 0, "Write seconds, for example 0.25.")
        check_whole("service.images_mb", self.images_mb, 1, "Write MiB, for example 1024.")

    def rows_of_a_request(self, most: int) -> int:
        """Rows of a request to a server that takes ``most``.

        Raises:
            SettingError: ``max_rows`` is more.
        """
        if self.max_rows > most:
            problem = f"is more than the {most} rows that the server takes."
            raise SettingError("service.max_rows", self.max_rows, problem, f"Write {most} or less, or 0.")
        return self.max_rows or most

    def token(self) -> str:
        """The token, or an empty string where none is wanted."""
        if not self.token_env:
            return ""
        token = os.environ.get(self.token_env, "").strip()
        if not token:
            problem = "is the name of no environment variable, or of an empty one."
            remedy = "Export the token under this name, or write the name of the variable that holds it."
            raise SettingError("service.token_env", self.token_env, problem, remedy)
        return token

    def connect(self) -> Any:
        """A pool of connections."""
        httpx, _ = (import_extra(n, extra="service", setting="service", value=self.url) for n in ("httpx", "tenacity"))
        token = self.token()
        return httpx.Client(
            base_url=self.url.rstrip("/"),
            timeout=self.timeout,
            limits=httpx.Limits(max_connections=self.connections, max_keepalive_connections=self.connections),
            headers={"Content-Type": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})},
        )
