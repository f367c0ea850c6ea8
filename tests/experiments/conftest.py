import pytest

from experiments.harness import Children
from tests.experiments import forked
from tests.experiments.fakes import ROOT


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture
def no_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be run."""
    monkeypatch.setattr(Children, "run", lambda _, command, *__: pytest.fail(f"ran {command}"))


@pytest.fixture
def forked_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are forks, which are quick to begin."""
    monkeypatch.setattr(Children, "run", forked.run)
