"""Arguments that several benchmarks read, refused in one line."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch


def writable(text: str) -> Path:
    """A file that can be written; found out before the measurement, not after it."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written. Give a file in a folder that exists.")
    return path


def a_number(text: str) -> int:
    """A whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 1 or more.")
    return int(text)


def a_device(text: str) -> torch.device:
    """A device that can be used."""
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used: {reason}. Write cpu.") from None
    return device
