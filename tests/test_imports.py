import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import flops_lightning

PACKAGE = Path(flops_lightning.__file__).parent
ROOT = PACKAGE.parent
LABORATORY = ("benchmarks", "experiments")
# From the ground up: a module may import from its own layer and from those below.
LAYERS = [
    {"errors", "objectives", "phases", "settings", "transfers"},
    {"distributed", "meter", "network", "noise", "prompts", "protocol", "queries", "robustness", "service"}
    | {"language", "suffix_loss"},
    {"allocators", "search", "strategies"},
    {"callbacks", "datamodules", "optim", "plan", "resume", "tasks", "tensorboard", "tune"},
    {"cli"},
    {"benchmarks", "experiments"},
]
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}
WITHOUT_LIGHTNING = LAYERS[0] | LAYERS[1] | LAYERS[2]
SLOW = (
    "cma",
    "httpx",
    "jsonargparse",
    "lightning",
    "matplotlib",
    "open_clip",
    "sklearn",
    "tenacity",
    "tensorboard",
    "timm",
    "torchvision",
)


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
    """The part of the project that a file belongs to: a module or folder of the package, or one of the laboratory."""
    first, *rest = file.relative_to(ROOT).parts
    return first if first in LABORATORY else rest[0].removesuffix(".py")


FILES = sorted(
    file
    for folder in (PACKAGE, *(ROOT / name for name in LABORATORY))
    for file in folder.rglob("*.py")
    if file != PACKAGE / "__init__.py"
)


def test_imports_run_one_way():
    wrong = []
    for file in FILES:
        where, needed = file.relative_to(ROOT), part(file)
        assert needed in HEIGHT, f"{where}: say in LAYERS where it belongs"
        for name in imports(file):
            root, *rest = name.split(".")
            needs = rest[0] if root == "flops_lightning" and rest else root
            if HEIGHT.get(needs, 0) > HEIGHT[needed]:
                wrong.append(f"{where} imports {name} from a layer above")
            if needed in WITHOUT_LIGHTNING and root in ("lightning", "pytorch_lightning", "jsonargparse"):
                wrong.append(f"{where} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_the_parts_of_a_layer_do_not_import_each_other_in_a_circle():
    graph = {name: set() for name in HEIGHT}
    for file in FILES:
        needed = {name.removeprefix("flops_lightning.").split(".")[0] for name in imports(file)}
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


@pytest.mark.slow
def test_tasks_and_data_load_no_command_line_before_it_is_used():
    # Lightning itself loads torchvision and matplotlib, through torchmetrics.
    loaded = loaded_by(
        "import flops_lightning as f; f.ForwardImageClassifier, f.DigitsDataModule, f.QueryAllocatorCallback\n"
        "assert 'lightning.pytorch.cli' not in sys.modules"
    )
    assert not loaded & {"jsonargparse", "sklearn", "timm"}


def test_every_public_name_comes_from_where_it_is_defined_and_others_are_attribute_errors():
    for name in flops_lightning.__all__:
        assert getattr(flops_lightning, name).__name__ == name
        assert name in dir(flops_lightning)
    with pytest.raises(AttributeError, match="Nothing"):
        flops_lightning.Nothing  # noqa: B018
