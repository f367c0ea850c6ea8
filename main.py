"""Run ``python main.py fit --config configs/vit_tiny_digits.yaml``; see ``python main.py --help``."""

import gc


def run() -> None:
    """Import the command line and hand over to it."""
    # Importing torch and Lightning makes hundreds of thousands of objects that all stay: looking for garbage among them
    # takes a fifth of the time until --help appears.
    gc.disable()
    from flops_lightning.cli.command import main

    gc.enable()
    main()


if __name__ == "__main__":
    run()
