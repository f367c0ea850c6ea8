"""Checks that several strategies share."""

from __future__ import annotations

import torch

from flops_lightning.distributed import Communicator, gather_plain
from flops_lightning.errors import SettingError


def check_common_seed(communicator: Communicator, seed: int, *, device: torch.device) -> None:
    """Every rank must draw by the same seed (and its own number): directions that are drawn again elsewhere are theirs.

    Raises:
        SettingError: the ranks have different seeds.
    """
    seeds = gather_plain(communicator, seed, device=device)
    if len(set(seeds)) > 1:
        raise SettingError(
            "strategy.seed", seed, f"the processes of this run have different seeds, {seeds}.",
            "Call seed_everything with the same seed in each before the strategy is made, or give `seed`.",
        )  # fmt: skip


def refuse_other_seed(own: int, resumed: int, *, given: bool, draws: str = "noise") -> None:
    """A resumed run draws the noise (or masks) of the run that it goes on with.

    Raises:
        SettingError: another seed was given explicitly.
    """
    if given and own != resumed:
        raise SettingError(
            "strategy.seed", own, f"the run to be resumed draws its {draws} from {resumed}.",
            f"Leave the seed out, or write {resumed}.",
        )  # fmt: skip
