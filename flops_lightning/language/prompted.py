"""A language model that reads learned tokens before the text, as peft's prompt tuning does."""

from typing import Any

import torch
from torch import Tensor, nn


class PromptedText(nn.Module):
    """Peft's prompt and its model as one network, in which the prompt of every text is a row of its own.

    peft runs the prompt once for all rows, where no query of a single text could start. Here each text has a copy, so
    that noise may enter at the module ``prompt``. Weights are those of peft's model, which stays in charge of them.

    Args:
        model: A ``PeftModel`` of prompt tuning.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        adapter = model.active_adapter
        self.prompt, self.lm = model.prompt_encoder[adapter], model.get_base_model()
        self.tokens = len(model.prompt_tokens[adapter])

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """``(b, t, v)`` logits at the tokens of the text; arguments as :func:`~flops_lightning.language.pack` makes."""
        numbers = torch.arange(self.tokens, device=input_ids.device).expand(len(input_ids), -1)
        text = self.lm.get_input_embeddings()(input_ids)
        given = {}
        if attention_mask is not None and position_ids is not None:
            given["attention_mask"] = self._with_prompt(attention_mask)
            given["position_ids"] = torch.cat((numbers, position_ids + self.tokens), dim=1)
        embedded = torch.cat((self.prompt(numbers).to(text.dtype), text), dim=1)
        logits: Tensor = self.lm(inputs_embeds=embedded, **given).logits
        return logits[:, self.tokens :]

    def _with_prompt(self, mask: Tensor) -> Tensor:
        """``(b, 1, n + t, n + t)``: all text reads the whole prompt, whose tokens read those before them."""
        n, (b, _, t, _) = self.tokens, mask.shape
        own = mask.new_full((n, n), -torch.inf).triu(1).expand(b, 1, n, n)
        of_prompt = torch.cat((own, mask.new_full((b, 1, n, t), -torch.inf)), dim=3)
        return torch.cat((of_prompt, torch.cat((mask.new_zeros(b, 1, t, n), mask), dim=3)), dim=2)
