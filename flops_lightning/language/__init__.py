"""Language models of transformers: stages, text as batches, losses of completions and captions (without Lightning)."""

from flops_lightning.language.candidates import (
    candidate_log_likelihoods,
    choice,
    completion,
    targets_of_labels,
    token_log_probabilities,
)
from flops_lightning.language.caption_loss import CaptionLoss
from flops_lightning.language.caption_scorer import CaptionScorer
from flops_lightning.language.caption_service import CaptionAnswers, RemoteCaptionLoss
from flops_lightning.language.encoding import EncodedText, encode, pack
from flops_lightning.language.models import as_written, load_language_model
from flops_lightning.language.staging import stage_causal_lm

__all__ = [
    "CaptionAnswers",
    "CaptionLoss",
    "CaptionScorer",
    "EncodedText",
    "RemoteCaptionLoss",
    "as_written",
    "candidate_log_likelihoods",
    "choice",
    "completion",
    "encode",
    "load_language_model",
    "pack",
    "stage_causal_lm",
    "targets_of_labels",
    "token_log_probabilities",
]  # fmt: skip
