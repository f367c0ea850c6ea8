"""Files given as ``ckpt_path`` that cannot serve are refused before anything is built."""

import warnings
import zipfile
from pathlib import Path

import torch

from flops_lightning.errors import SettingError

RUNS = "runs"
WHERE = f"Give the path of a checkpoint; they lie under {RUNS}/NAME/VERSION/checkpoints."
_PLAIN = f"Give one from {RUNS}/NAME/VERSION/checkpoints, or start from plain weights with model.init_args.checkpoint."
_PARTS = ("state_dict", "pytorch-lightning_version")  # of every checkpoint that Lightning writes
_SHARDED = ("meta.pt", "checkpoint")  # what marks a folder as a checkpoint, of FSDP and of DeepSpeed


def check_checkpoint(file: Path, *, resume: bool, trusted: bool) -> None:
    """Refuse a file that is not a checkpoint of Lightning, or has no optimiser to ``resume`` training from.

    ``trusted``: the user allows code inside the file to run, with ``weights_only: false``.
    """

    def refusal(problem: str, remedy: str = _PLAIN) -> SettingError:
        return SettingError("ckpt_path", str(file), problem, remedy)

    if any((file / name).exists() for name in _SHARDED):
        return  # a folder written by several processes, which Lightning checks itself
    if not file.is_file():
        raise refusal("is not a file.", WHERE)
    if file.suffix == ".safetensors":
        raise refusal("holds weights alone, but --ckpt_path takes a checkpoint of a run.")
    try:
        # Mapped and not read: the tensors, read later by Lightning, are skipped. Only the zip format can be mapped.
        with warnings.catch_warnings():  # about odd formats; what is refused is said below
            warnings.simplefilter("ignore")
            content = torch.load(file, map_location="cpu", weights_only=not trusted, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # the file may hold anything
        remedy = "one with pickled objects needs --weights_only false, if you trust its code."
        raise refusal(f"cannot be read ({type(error).__name__}).", f"Give an undamaged checkpoint; {remedy}") from error
    if not isinstance(content, dict) or not content.keys() >= set(_PARTS):
        names = ", ".join(map(repr, list(content)[:4])) if isinstance(content, dict) else ""
        held = f"a dictionary with {names}" if names else f"a {type(content).__name__}"
        raise refusal(f"holds {held}, but a checkpoint of a run has {_PARTS[0]!r} and {_PARTS[1]!r}.")
    if resume and "optimizer_states" not in content:
        raise refusal("holds the weights of a run without the optimiser's state, which `fit` needs to go on.")
