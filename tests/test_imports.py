from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import flops_lightning

PACKAGE = Path(flops_lightning.__file__).parent
# From the ground up: a module may import from its own layer and from those below.
LAYERS = [
    {"errors", "objectives", "phases", "settings"},
    {"distributed", "meter", "network", "noise", "queries"},
    {"allocators", "strategies"},
    {"callbacks", "datamodules", "optim", "plan", "resume", "tasks"},
    {"cli"},
    {"benchmarks", "experiments"},
]
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}
WITHOUT_LIGHTNING = LAYERS[0] | LAYERS[1] | LAYERS[2]
SLOW = ("jsonargparse", "lightning", "matplotlib", "sklearn", "tensorboard", "timm", "torchvision")


def imports(file: Path) -> set[str]:
    """Every module that a file imports, wherever in it; `from a import b` counts as `a.b`."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def part(file: Path) -> str:
    """The module or subpackage directly below the package that a file belongs to."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_run_one_way(file):
    assert part(file) in HEIGHT, "say in LAYERS where it belongs"
    for name in imports(file):
        root, *rest = name.split(".")
        if root == "flops_lightning" and rest and rest[0] in HEIGHT:
            assert HEIGHT[rest[0]] <= HEIGHT[part(file)], f"imports {name} from a layer above"
        if part(file) in WITHOUT_LIGHTNING:
            assert root not in ("lightning", "pytorch_lightning", "jsonargparse"), f"imports {name}"


def test_the_parts_of_a_layer_do_not_import_each_other_in_a_circle():
    graph = {name: set() for name in HEIGHT}
    for file in FILES:
        needed = {name.split(".")[1] for name in imports(file) if name.startswith("flops_lightning.")}
        graph[part(file)] |= (needed & HEIGHT.keys()) - {part(file)}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError on a circle
    assert set(order) == HEIGHT.keys()


def loaded_by(statement: str) -> set[str]:
    """Roots of the modules that a fresh interpreter has loaded after ``statement``."""
    code = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(answer.stdout.split())


def test_importing_the_library_loads_nothing_slow():
    assert not loaded_by("import flops_lightning; flops_lightning.__version__") & {"torch", "numpy", *SLOW}


def test_strategies_and_allocators_work_without_lightning_and_timm():
    loaded = loaded_by("import flops_lightning as f; f.LikelihoodRatio, f.GaussianAllocator, f.stage_network")
    assert "torch" in loaded
    assert not loaded & set(SLOW)


def test_tasks_and_data_load_no_command_line_before_it_is_used():
    # Lightning itself loads torchvision and matplotlib, through torchmetrics.
    loaded = loaded_by(
        "import flops_lightning as f; f.ForwardImageClassifier, f.DigitsDataModule, f.QueryAllocatorCallback\n"
        "assert 'lightning.pytorch.cli' not in sys.modules"
    )
    assert not loaded & {"jsonargparse", "sklearn", "timm"}


@pytest.mark.parametrize("name", sorted(set(flops_lightning.__all__) - {"__version__"}))
def test_every_public_name_comes_from_where_it_is_defined(name):
    assert getattr(flops_lightning, name).__name__ == name
    assert name in dir(flops_lightning)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        flops_lightning.Nothing  # noqa: B018
