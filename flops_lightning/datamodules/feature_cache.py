"""Features of images on disk: computed once, mapped into memory by every later run and process."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from flops_lightning.errors import SettingError

NAME = "features"
"""Of the tensor in the file."""


@dataclass(frozen=True)
class FeatureKey:
    """What features follow from.

    Attributes:
        encoder: Name and hash of the weights of what computed them.
        feature: Which of its outputs they are.
        transform: How images were resized and normalised.
        files: Of which images they are, :func:`hash_of_files`.
    """

    encoder: str
    feature: str
    transform: str
    files: str

    def differences(self, other: "FeatureKey") -> str:
        """Both values of every part that differs."""
        then, now = asdict(self), asdict(other)
        if self.files != other.files:
            then["files"], now["files"] = self.files[:8], f"{other.files[:8]} (another split, or files that changed)"
        return "; ".join(f"{name} {then[name]!r}, and here {now[name]!r}" for name in then if then[name] != now[name])


def hash_of_files(names: Sequence[str], sizes: Sequence[int | None]) -> str:
    """SHA-256 of names and sizes in bytes, in their order."""
    return hashlib.sha256(json.dumps([list(names), list(sizes)]).encode()).hexdigest()


def read_features(file: Path) -> tuple[FeatureKey, Tensor]:
    """The key of a file, and its features ``(n, ...)``, mapped: pages are read when they are used.

    Raises:
        SettingError: it is not such a file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as stored:
            return FeatureKey(**(stored.metadata() or {})), stored.get_tensor(NAME)
    except (SafetensorError, TypeError, OSError) as error:
        problem = f"holds no features ({type(error).__name__}: {error})."
        raise SettingError("data.cache_dir", str(file), problem, "Write cache: rebuild, or remove the file.") from error


def cached_features(file: Path, key: FeatureKey, compute: Callable[[], Tensor], *, rebuild: bool = False) -> Tensor:
    """``(n, ...)`` features from a file, which is written first where it is not there.

    Of several processes that ask at once, one computes them and the others wait. A file is whole or not there. Nothing
    is written where it is there, so that its folder may be read-only.

    Args:
        file: A safetensors file.
        key: What the features follow from.
        compute: Computes them, on the CPU.
        rebuild: Replace features of another key; those of the same key are kept.

    Raises:
        SettingError: the file holds features of another key, and ``rebuild`` is not asked for; or it cannot be written.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> key = FeatureKey(encoder="vit", feature="pooled", transform="resize 32", files="")
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder) / "train.safetensors"
        ...     once = cached_features(file, key, lambda: torch.ones(3, 2))
        ...     again = cached_features(file, key, lambda: torch.zeros(3, 2))
        >>> torch.equal(again, torch.ones(3, 2))
        True
    """
    from filelock import FileLock

    features = _features_of(key, file, rebuild=rebuild)
    if features is not None:
        return features
    lock = FileLock(file.with_name(f"{file.name}.lock"))
    with _writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        features = _features_of(key, file, rebuild=rebuild)
        if features is None:
            _write(file, compute(), key)
            features = read_features(file)[1]
    finally:
        lock.release()
    return features


def _features_of(key: FeatureKey, file: Path, *, rebuild: bool) -> Tensor | None:
    """Those that are there; None where they are to be computed."""
    if not file.exists():
        return None
    try:
        found, features = read_features(file)
    except SettingError:
        if not rebuild:
            raise
        return None
    if found == key:
        return features
    if not rebuild:
        problem = f"{file} has {found.differences(key)}."
        raise SettingError("data.cache", "use", problem, "Write cache: rebuild, or another cache_dir.")
    return None


def _write(file: Path, features: Tensor, key: FeatureKey) -> None:
    from safetensors.torch import save_file

    partial = file.with_name(f".{file.name}.partial")
    try:
        with _writing(file):
            save_file({NAME: features.contiguous()}, partial, asdict(key))
            with partial.open("rb") as stream:
                os.fsync(stream.fileno())
            partial.replace(file)  # processes that map the old file keep it
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _writing(file: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        problem = f"cannot be written ({type(error).__name__}: {error})."
        remedy = "Give a folder with room that can be written to, or leave cache_dir out."
        raise SettingError("data.cache_dir", str(file), problem, remedy) from error


def gathered(batches: Iterable[Tensor], size: int) -> Tensor:
    """``(n, ...)``: batches one after the other, in memory that is taken once."""
    start, whole = 0, torch.empty(0)
    for batch in batches:
        if start == 0:
            whole = torch.empty(size, *batch.shape[1:], dtype=batch.dtype)
        whole[start : start + len(batch)] = batch
        start += len(batch)
    return whole
