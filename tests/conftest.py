import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

# The same examples on every run: a property that fails fails for everyone.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

# One thread, for fixtures of modules too: sums in one order, and no threads fighting over the cores of small machines.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Slow tests train for minutes on a busy machine; the limit in pyproject.toml is for those that hang.
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(1200))


def pytest_collection_finish() -> None:
    # What is here now stays to the end: nothing is gained by looking through its million objects again and again.
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded_on_one_thread() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def vit() -> nn.Module:
    """A tiny float64 ViT: 4 patches and a class token, 3 blocks, pooling by the class token."""
    from tests.reference.networks import tiny_vit  # here, as xdist's first process, which runs no test, waits for timm

    return tiny_vit()


@pytest.fixture
def images() -> tuple[Tensor, Tensor]:
    """Four 8x8 images and their classes."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 1, 8, 8, generator=generator, dtype=torch.float64), torch.tensor([0, 3, 4, 1])


@pytest.fixture
def tokens_net() -> nn.Sequential:
    """A tiny float64 ``nn.Sequential`` on tokens, with stages 0 to 4."""
    from tests.reference.networks import token_network

    return token_network()


@pytest.fixture
def tokens() -> tuple[Tensor, Tensor]:
    """Four samples of 3 tokens and their targets."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4, 3, 3, generator=generator, dtype=torch.float64)
    return x, torch.randn(4, 2, generator=generator, dtype=torch.float64)


@pytest.fixture
def digits() -> Any:
    from flops_lightning.datamodules import DigitsDataModule

    return DigitsDataModule(batch_size=32)


@pytest.fixture
def make_task() -> Callable[..., Any]:
    """Make the tiny classifier of ``tests.digits``."""
    from tests.digits import classifier

    return classifier


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Any]:
    """Make a trainer for one epoch of three batches."""
    from tests.digits import quiet_trainer

    usual = {"limit_train_batches": 3, "limit_val_batches": 1, "num_sanity_val_steps": 0, "default_root_dir": tmp_path}
    return lambda *callbacks, **settings: quiet_trainer(*callbacks, **{**usual, **settings})


@pytest.fixture
def shared_data() -> Callable[[str], Path]:
    """Find real data by its path in the folder of test data, or skip the test where it is not there."""
    beside_checkout = Path(__file__).parents[2] / "shared"
    folder = Path(os.environ.get("FLOPS_LIGHTNING_TEST_DATA", beside_checkout))

    def find(name: str) -> Path:
        if not (folder / name).exists():
            pytest.skip(f"no {name} in {folder}; FLOPS_LIGHTNING_TEST_DATA names the folder of test data")
        return folder / name

    return find


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command line, which must refuse, and return its one line about that."""

    def run(*args: str) -> str:
        from flops_lightning.cli.command import main

        with pytest.raises(SystemExit) as leaving:
            main(list(args))
        assert leaving.value.code == 2
        error = capsys.readouterr().err.rstrip("\n")
        assert "Traceback" not in error
        *before, last = error.splitlines()
        assert last.startswith("error: ")
        assert len(before) < 10
        assert len(last) < 400
        return last.removeprefix("error: ")

    return run
