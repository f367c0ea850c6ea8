"""Features on disk: whole or not there, and written once however many processes ask."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flops_lightning.datamodules.feature_cache import FeatureKey, cached_features, hash_of_files, read_features
from flops_lightning.errors import SettingError

KEY = FeatureKey(encoder="vit 12ab", feature="pooled", transform="resize 32", files="ff")
FORKS = multiprocessing.get_context("fork")


def slowly(folder: Path, value: float) -> Tensor:
    (folder / f"computed{os.getpid()}").touch()
    time.sleep(0.3)
    return torch.full((5, 2), value)


def ask(folder: Path, value: float) -> None:
    features = cached_features(folder / "train.safetensors", KEY, lambda: slowly(folder, value))
    (folder / f"got{os.getpid()}").write_text(str(float(features.sum())))


def test_two_processes_that_start_at_once_compute_once_and_read_the_same(tmp_path):
    processes = [FORKS.Process(target=ask, args=(tmp_path, value)) for value in (1.0, 2.0)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(list(tmp_path.glob("computed*"))) == 1
    first, second = (file.read_text() for file in tmp_path.glob("got*"))
    assert first == second


def dies(folder: Path) -> None:
    def compute() -> Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    cached_features(folder / "train.safetensors", KEY, compute)


def test_a_process_that_dies_leaves_no_lock_and_no_half_a_file(tmp_path):
    process = FORKS.Process(target=dies, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    features = cached_features(tmp_path / "train.safetensors", KEY, lambda: torch.ones(2, 1))
    assert torch.equal(features, torch.ones(2, 1))


def test_features_are_mapped_and_survive_a_rebuild(tmp_path):
    file, other = tmp_path / "a.safetensors", FeatureKey("clip", KEY.feature, KEY.transform, KEY.files)
    old = cached_features(file, KEY, lambda: torch.ones(1000, 64))
    inode = str(file.stat().st_ino)
    assert any(
        line.split()[4] == inode for line in Path("/proc/self/maps").read_text().splitlines() if len(line.split()) > 5
    )
    new = cached_features(file, other, lambda: torch.zeros(1000, 64), rebuild=True)
    assert old.eq(1).all()
    assert new.eq(0).all()
    assert read_features(file)[0] == other


def test_a_damaged_file_is_refused_or_rebuilt(tmp_path):
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"nothing of use")
    with pytest.raises(SettingError, match=r"holds no features .*cache: rebuild"):
        cached_features(file, KEY, lambda: torch.ones(1))
    assert cached_features(file, KEY, lambda: torch.ones(1), rebuild=True).eq(1).all()


def test_features_that_are_there_are_read_from_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    file = tmp_path / "a.safetensors"
    cached_features(file, KEY, lambda: torch.ones(2, 1))

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    assert cached_features(file, KEY, lambda: torch.zeros(2, 1)).eq(1).all()
    with pytest.raises(SettingError, match=r"data.cache_dir = .*b.safetensors': cannot be written \(PermissionError"):
        cached_features(tmp_path / "b.safetensors", KEY, lambda: torch.ones(2, 1))
    (tmp_path / "file").touch()
    with pytest.raises(SettingError, match=r"cannot be written \(FileExistsError"):
        cached_features(tmp_path / "file" / "c.safetensors", KEY, lambda: torch.ones(2, 1))


def test_a_disk_that_is_full_leaves_no_half_a_file(tmp_path, monkeypatch):
    def half(tensors, file, metadata):
        file.write_bytes(b"the first half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", half)
    with pytest.raises(SettingError, match=r"cannot be written \(OSError: .*No space left on device"):
        cached_features(tmp_path / "a.safetensors", KEY, lambda: torch.ones(2, 1))
    assert [file.name for file in tmp_path.iterdir()] in ([], ["a.safetensors.lock"])


def test_the_list_of_files_tells_names_sizes_and_order_apart():
    hashes = {
        hash_of_files(*each)
        for each in ((["a", "b"], [1, 2]), (["b", "a"], [1, 2]), (["a", "b"], [1, 3]), (["ab"], [1]))
    }
    assert len(hashes) == 4
