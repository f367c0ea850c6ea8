"""Language models of transformers: stages, text as batches, and losses of completions (without Lightning)."""

from flops_lightning.language.candidates import (
    candidate_log_likelihoods,
    choice,
    completion,
    targets_of_labels,
    token_log_probabilities,
)
from flops_lightning.language.encoding import EncodedText, encode, pack
from flops_lightning.language.staging import stage_causal_lm

__all__ = [
    "EncodedText", "candidate_log_likelihoods", "choice", "completion", "encode", "pack", "stage_causal_lm",
    "targets_of_labels", "token_log_probabilities",
]  # fmt: skip
