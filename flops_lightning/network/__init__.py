"""Networks as the queries see them: stages that run one after the other, compiled or not, and the memory they take."""

from flops_lightning.network.staging import Stage, StagedNetwork, stage_network

__all__ = ["Stage", "StagedNetwork", "stage_network"]
