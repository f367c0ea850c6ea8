import doctest
import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest

import flops_lightning

ROOT = Path(__file__).parent.parent
PACKAGES = (
    "allocators",
    "callbacks",
    "datamodules",
    "language",
    "network",
    "prompts",
    "robustness",
    "search",
    "service",
    "strategies",
    "tasks",
)


def public() -> dict[str, type]:
    """Public classes by the path that users import them from."""
    homes = ["flops_lightning", *(f"flops_lightning.{package}" for package in PACKAGES)]
    objects = {}
    for home in homes:
        module = import_module(home)
        objects |= {getattr(module, name): f"{home}.{name}" for name in module.__all__ if not name.startswith("__")}
    return {path: thing for thing, path in objects.items() if inspect.isclass(thing)}


PUBLIC = public()


def examples(thing: type) -> list[doctest.DocTest]:
    """The examples in the docstrings of a class and of its own methods."""
    return [test for test in doctest.DocTestFinder().find(thing, thing.__name__) if test.examples]


@pytest.mark.parametrize("path", sorted(PUBLIC))
def test_every_public_class_has_an_example_that_runs(path):
    found = examples(PUBLIC[path])
    assert found, f"{path}: add a short example (>>>) to its docstring"
    for test in found:
        report: list[str] = []
        failures = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS).run(
            test, out=report.append
        )
        assert not failures.failed, "".join(report)


def test_every_public_name_is_documented():
    for name in flops_lightning.__all__:
        assert inspect.getdoc(getattr(flops_lightning, name)), name


def test_every_file_that_the_table_of_formulas_names_is_there():
    table = (ROOT / "docs" / "architecture.md").read_text().split("## Where to find a formula")[1].split("##")[0]
    rows = [line.split("|")[2] for line in table.splitlines() if line.startswith("| ")][1:]
    for row in rows:
        folder = ""
        for name in re.findall(r"`([a-z0-9_/]+\.py)`", row):
            folder, _, file = name.rpartition("/") if "/" in name else (folder, "", name)  # beside the one before
            assert any((base / folder / file).is_file() for base in (ROOT / "flops_lightning", ROOT)), name
    assert len(rows) > 20
