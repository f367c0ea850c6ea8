"""Run ``python main.py fit --config configs/vit_tiny_digits.yaml``; see ``python main.py --help``."""

from __future__ import annotations

from flops_lightning.cli import main

if __name__ == "__main__":
    main()
