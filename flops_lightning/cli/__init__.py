"""The command line: ``flops-lightning`` or ``python main.py``."""

from flops_lightning.cli.command import main

__all__ = ["main"]
