"""Which parameters of a language model learn: all, a part of its own, or an adapter of the library peft."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from flops_lightning.errors import SettingError, check_choice, check_flag, check_positive, check_whole, import_extra

TargetKind = Literal["full", "lora", "prompt", "prefix", "norm", "bias", "head"]
_ONLY_FOR = {
    "rank": ("lora",), "alpha": ("lora",), "modules": ("lora",), "tokens": ("prompt", "prefix"),
    "untie": ("full", "head"),
}  # fmt: skip


@dataclass
class LanguageTarget:
    """Setting: which parameters of a language model are trained.

    Attributes:
        kind: ``full``: all. ``lora``: low-rank updates of linear layers (Hu et al., ICLR 2022). ``prompt``: tokens
            before the text (prompt tuning, Lester et al., EMNLP 2021). ``prefix``: keys and values before the text in
            every layer (prefix tuning, Li and Liang, ACL 2021). ``norm``: the normalisation layers. ``bias``: the
            biases (BitFit, Ben Zaken et al., ACL 2022). ``head``: the output layer. ``lora``, ``prompt``
            and ``prefix`` use the library peft.
        rank: ``lora`` only: rank of each update.
        alpha: ``lora`` only: updates are scaled by ``alpha / rank``.
        modules: ``lora`` only: suffixes of the names of the modules to update, as peft expects them; None: peft's
            choice for the architecture.
        tokens: ``prompt`` and ``prefix`` only: their number. Both start at random tokens of the vocabulary: a prompt at
            their embeddings, a prefix at the keys and values that the model has for them.
        untie: ``full`` and ``head`` only: give the output layer a copy of the embedding if the two share a weight.
            Queries that start between the two cannot train a shared weight.

    Example:
        >>> LanguageTarget(kind="lora", rank=8, alpha=16.0).check()
        >>> LanguageTarget(kind="norm", rank=2).check()
        Traceback (most recent call last):
        ...
        flops_lightning.errors.SettingError: target.rank = 2: has no effect with kind: norm. Remove it.
    """

    kind: TargetKind = "full"
    rank: int = 8
    alpha: float = 16.0
    modules: list[str] | None = None
    tokens: int = 8
    untie: bool = False

    def check(self) -> None:
        """Raise a :class:`SettingError` for values out of range or without effect."""
        check_choice("target.kind", self.kind, get_args(TargetKind))
        for name, kinds in _ONLY_FOR.items():
            value = getattr(self, name)
            if self.kind not in kinds and value != getattr(LanguageTarget(), name):
                raise SettingError(f"target.{name}", value, f"has no effect with kind: {self.kind}.", "Remove it.")
        for name in ("rank", "tokens"):
            check_whole(f"target.{name}", getattr(self, name), 1, "Write, for example, 8.")
        check_positive("target.alpha", self.alpha, "Write, for example, 16.0.")
        check_flag("target.untie", self.untie)
        if isinstance(self.modules, str) or self.modules == []:
            problem, remedy = "must be a list of endings of names.", "Write, for example, [q_proj, v_proj]."
            raise SettingError("target.modules", self.modules, problem, remedy)


def apply_target(model: Any, settings: LanguageTarget) -> Any:
    """Freeze what does not learn and add what the target adds; the model to save: a ``PeftModel`` of an adapter.

    Raises:
        SettingError: the model has no such parameters, or peft cannot be imported or does not know the architecture.
    """
    settings.check()
    _check_quantized(model, settings.kind)
    if settings.untie:
        _untie(model)
    if settings.kind in ("lora", "prompt", "prefix"):
        return _with_adapter(model, settings)
    trained = _names(model, settings.kind)
    if not trained:
        problem = f"{type(model).__name__} has no such parameters."
        raise SettingError("target.kind", settings.kind, problem, "Choose another kind.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    if settings.kind == "head" and tied(model):
        problem = "is the embedding's weight too."
        raise SettingError("target.kind", "head", problem, "Write untie: true, which gives the head a copy of it.")
    return model


def tied(model: Any) -> bool:
    """Whether the output layer's weight is that of the embedding."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and head.weight is embedding.weight


def _names(model: Any, kind: TargetKind) -> set[str]:
    named = dict(model.named_parameters())
    if kind == "bias":
        return {name for name in named if name.endswith((".bias", "_bias"))}
    if kind == "norm":
        norms = (n for n, module in model.named_modules() if "norm" in type(module).__name__.lower())
        prefixes = tuple(f"{name}." for name in norms)
        return {name for name in named if prefixes and name.startswith(prefixes)}
    if kind == "head":
        own = {id(p) for p in model.get_output_embeddings().parameters()}
        return {name for name, p in named.items() if id(p) in own}
    return set(named)


def _check_quantized(model: Any, kind: TargetKind) -> None:
    if kind == "full" and getattr(model, "is_quantized", False):
        problem = "a quantised model's weights are whole numbers, which take no small steps."
        raise SettingError("target.kind", kind, problem, "Train lora, prompt, prefix, norm or bias there.")


def _untie(model: Any) -> None:
    if not tied(model):
        problem = f"has no effect: the output layer of {type(model).__name__} has a weight of its own."
        raise SettingError("target.untie", True, problem, "Write false.")
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False


def _with_adapter(model: Any, settings: LanguageTarget) -> Any:
    peft = import_extra("peft", extra="llm", setting="target.kind", value=settings.kind)
    task: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    config: Any
    if settings.kind == "lora":
        alpha: Any = settings.alpha  # declared as an integer, and only ever divided by the rank
        config = peft.LoraConfig(r=settings.rank, lora_alpha=alpha, target_modules=settings.modules, **task)
    elif settings.kind == "prompt":
        start = peft.PromptTuningInit.SAMPLE_VOCAB  # random numbers would be far from all tokens
        config = peft.PromptTuningConfig(num_virtual_tokens=settings.tokens, prompt_tuning_init=start, **task)
    else:
        config = peft.PrefixTuningConfig(num_virtual_tokens=settings.tokens, **task)
    try:
        adapted = peft.get_peft_model(model, config)
    except ValueError as error:
        where = "target.modules" if settings.kind == "lora" else "target.kind"
        value = settings.modules if settings.kind == "lora" else settings.kind
        remedy = "Write endings of names of its linear modules, or choose another kind."
        raise SettingError(where, value, f"peft refuses {type(model).__name__}: {error}.", remedy) from error
    if settings.kind == "prefix":
        size = len(model.get_input_embeddings().weight)
        ids = torch.randint(size, (1, settings.tokens), device=model.get_input_embeddings().weight.device)
        with torch.no_grad():
            seen = model(input_ids=ids, use_cache=True).past_key_values
        peft.initialize_kv_prefix_from_past_key_values(adapted, past_key_values=seen)
    return adapted
