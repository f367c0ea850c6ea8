"""``CaptionLoss``: a frozen causal language model in this process as the loss of what is fed to it."""

from copy import copy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from flops_lightning.errors import SettingError, check_whole
from flops_lightning.language.caption_scorer import CaptionScorer
from flops_lightning.language.loss_noise import check_sigma
from flops_lightning.language.quantized import OBSTACLE, followed_by_autograd, quantized, without_weights
from flops_lightning.network.compilation import LIMIT, check_compiler
from flops_lightning.network.operations import flops
from flops_lightning.queries import at_least_float32
from flops_lightning.suffix_loss import PaddedTargets

COMPILED_MULTIPLE = 8
"""Lengths of compiled sequences are multiples of it, so that few shapes are compiled."""
LARGEST_SLICE = 2**24
"""Numbers of logits that the cross-entropy takes at once; beside the logits it takes as much memory again."""
COUNTED = (2, 4, 6)
"""Lengths of the captions on which operations are counted; a polynomial of degree 2 goes through them exactly."""


class CaptionLoss(CaptionScorer):
    """Scores captions with a causal language model of transformers, which is never trained.

    It is put in eval mode and its parameters are frozen; it stays outside of every module, so that no ``state_dict``,
    optimiser or ``.to()`` reaches it. It runs in the dtype in which it was loaded (vectors are cast to it), without a
    cache, since all text follows the vectors, and without a mask: what is padded comes after the caption, where a
    causal model does not see it. The head runs at caption positions only, the log-softmax in float32.

    Captions are :class:`~flops_lightning.suffix_loss.PaddedTargets` of ids; a chunk is cut to its longest. Padded ids
    may be anything. Ids that are ``given``, a question, stand between the vectors and the caption and are not scored.

    transformers look at the positions where no mask is given, so that the host waits for a GPU once in each chunk.

    The model may be quantised. If activations are as well as weights, autograd may not follow it (``differentiable`` is
    found out by finite differences), and losses are rounded (:meth:`check_sigma`).

    Attributes:
        llm: The model: called with ``inputs_embeds``, ``use_cache`` and ``logits_to_keep``, it returns ``logits``.
        multiple: Lengths are rounded up to a multiple of it.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> llm = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
        >>> from flops_lightning import LikelihoodRatio, PaddedTargets, stage_network
        >>> adapter = torch.nn.Sequential(torch.nn.Linear(8, 2 * 16))
        >>> strategy = LikelihoodRatio(sites=[{"stages": ["0"], "kind": "linear", "queries_per_sample": 20}], seed=0)
        >>> strategy.bind(stage_network(adapter), CaptionLoss(llm, visual_tokens=2))
        >>> captions = PaddedTargets.of([torch.tensor([5, 6, 7]), torch.tensor([8])])
        >>> strategy.estimate(strategy.clean_pass(torch.randn(2, 8), captions)).loss.shape
        torch.Size([2])
    """

    obstacle = OBSTACLE

    def __init__(
        self, llm: Any, *, visual_tokens: int = 1, bos: int | None = None, eos: int | None = None, multiple: int = 1
    ) -> None:
        """Freeze the model.

        Args:
            llm: A causal language model, on its device.
            visual_tokens: Number ``k`` of vectors before a caption.
            bos: Token before the vectors, as in LLaVA; None: none, as in the paper.
            eos: Token after each caption; None: none.
            multiple: Round the lengths of chunks up to a multiple; 1: do not.
        """
        check_whole("multiple", multiple, 1, "Write 1 or more.")
        self.llm, self.multiple = llm.eval().requires_grad_(False), multiple
        self._forward, self._looked, self._quantized = llm, False, quantized(llm)
        self._polynomial: tuple[float, ...] = ()
        table = self._embedding.weight
        context = int(getattr(llm.config, "max_position_embeddings", 0) or 0)
        super().__init__(table.shape[1], context=context, visual_tokens=visual_tokens, bos=bos, eos=eos)
        self.vocabulary = len(table)
        for name, token in (("bos", bos), ("eos", eos)):
            if token is not None and not 0 <= token < len(table):
                raise self._unknown(name, token)

    @cached_property
    def differentiable(self) -> bool:  # type: ignore[override]
        """Whether autograd can follow it; of a quantised model measured when it is first asked for."""
        return not self._quantized or followed_by_autograd(self.llm)

    @property
    def _embedding(self) -> Any:
        return self.llm.get_input_embeddings()

    def score(self, embeddings: Tensor | None, ids: PaddedTargets) -> Tensor:
        """See :meth:`CaptionScorer.score`; the model and what it is given are on one device."""
        captions = self.closed(ids)
        self.check_captions(embeddings, captions)
        multiple, alone = self.multiple, embeddings is None
        if self.context and self.positions(captions.length(multiple), alone=alone) > self.context:
            multiple = 1  # learned positions end where the context does
        mask = captions.mask(multiple)
        tokens = torch.where(mask, captions.trimmed(multiple), 0)
        if not self._looked:  # at the first captions; later ones would make the device wait
            self._check_ids(tokens)
        logits = self._forward(
            inputs_embeds=self._inputs(embeddings, tokens), use_cache=False, logits_to_keep=tokens.shape[1]
        ).logits
        rows = max(1, LARGEST_SLICE // logits[0].numel()) if len(logits) else 1
        parts = zip(logits.split(rows), tokens.split(rows), strict=True)
        lost = [cross_entropy(at_least_float32(x.flatten(0, 1)), t.flatten(), reduction="none") for x, t in parts]
        of_token, scored = torch.cat(lost).view_as(mask), captions.scored(multiple)
        return torch.where(scored, of_token, 0.0).sum(1) / scored.sum(1)

    def _inputs(self, embeddings: Tensor | None, tokens: Tensor) -> Tensor:
        parts = [self._embedding(tokens[:, :-1])]
        if embeddings is not None:
            parts.insert(0, embeddings.to(parts[-1].dtype))
        if self.bos is not None:
            parts.insert(0, self._embedding(tokens.new_full((1, 1), self.bos)).expand(len(tokens), -1, -1))
        return torch.cat(parts, dim=1)

    def _check_ids(self, tokens: Tensor) -> None:
        self._looked = True
        wrong = tokens[(tokens < 0) | (tokens >= self.vocabulary)]
        if len(wrong):
            raise self._unknown("captions", int(wrong[0]))

    def _unknown(self, name: str, token: int) -> SettingError:
        problem = f"is no id of the language model, whose embedding has {self.vocabulary}."
        return SettingError(name, token, problem, "Use the tokenizer of this model.")

    def check_sigma(self, outputs: Tensor, targets: PaddedTargets, sigma: float) -> None:
        """See :meth:`SuffixLoss.check_sigma`; measured where the model runs in half precision or is quantised."""
        dtype = self._embedding.weight.dtype
        if dtype.itemsize < torch.float32.itemsize or self._quantized:
            check_sigma(self, outputs, targets, sigma, dtype, quantized=self._quantized)

    @torch.no_grad()
    def polynomial(self) -> tuple[float, ...]:
        """See :meth:`CaptionScorer.polynomial`; counted once, on three short captions."""
        if not self._polynomial:
            llm, found = without_weights(self.llm), []
            table = llm.get_input_embeddings().weight
            for tokens in COUNTED:
                length = self.positions(tokens)
                one = torch.zeros(1, length, self.width, dtype=table.dtype, device=table.device)
                # Without weights transformers cannot look at the positions, as they do where no mask is given.
                mask = one.new_zeros(1, 1, length, length) if table.is_meta else None

                def run(x: Tensor, tokens: int = tokens, mask: Tensor | None = mask) -> Tensor:
                    given = {"use_cache": False, "logits_to_keep": tokens, "attention_mask": mask}
                    logits: Tensor = llm(inputs_embeds=x, **given).logits
                    return logits

                found.append(flops(run, one)[0])
            (x, y, z), (f, g, h) = COUNTED, found
            # Newton's divided differences: exact for whole numbers, as a solver's are not.
            first, second = (g - f) / (y - x), (h - g) / (z - y)
            square = (second - first) / (z - x)
            self._polynomial = (square, first - square * (x + y), f - first * x + square * x * y)
        return self._polynomial

    def compiled(self) -> "CaptionLoss":
        """The same loss through ``torch.compile``, with lengths in multiples of 8.

        Raises:
            SettingError: nothing can be compiled on this machine.
        """
        check_compiler(self._embedding.weight.device)
        other = copy(self)
        other.multiple = max(self.multiple, COMPILED_MULTIPLE)
        other._forward = torch.compile(self.llm, dynamic=False, **LIMIT)
        return other
