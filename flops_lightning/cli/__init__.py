"""The command line: ``flops-lightning`` or ``python main.py``."""

from __future__ import annotations

from flops_lightning.cli.command import main

__all__ = ["main"]
