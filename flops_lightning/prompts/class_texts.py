"""The texts of all classes of a CLIP, encoded as a tree: what they share is computed once.

A class text is ``[start] [prompt] [name] [rest of the template] [end]``. In a causal text tower the first two see
nothing of the name, so they are the same in every class. Here they stand once in front of the endings of up to 64
classes, sorted by length, in one sequence: a mask lets an ending see the prefix and itself, and its positions go on
from the prefix. The result is that of one padded sequence a class, at a small part of its cost.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from flops_lightning.errors import SettingError, import_extra
from flops_lightning.queries import at_least_float32

CLASSES_AT_ONCE = 64
TOKENS_AT_ONCE = 4096
Tokenizer = Callable[..., Tensor]
"""``(texts, context_length=...) -> (c, context_length)`` token ids, as the tokenizers of open_clip."""


class ClassTexts(nn.Module):
    """Texts of classes for a CLIP of open_clip, and the parts of its text tower that encode them.

    Attributes:
        names: Names of the classes, in the order of the logits.
        template: Text with ``{}`` where the name stands.
        context: Most tokens of a text.
        width: Width of a token.

    Example:
        >>> import open_clip
        >>> tower = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
        >>> vision = {"image_size": 8, "patch_size": 4, "width": 16, "head_width": 8, "layers": 1}
        >>> clip = open_clip.CLIP(embed_dim=8, vision_cfg=vision, text_cfg=tower).eval()
        >>> texts = ClassTexts(clip, ["dog", "hot air balloon"], "a photo of a {}.")
        >>> texts.encode(texts.words(4)[None]).shape  # prompts, classes, features
        torch.Size([1, 2, 8])
        >>> given = clip.encode_text(open_clip.tokenize(["a photo of a dog."], context_length=16), normalize=True)
        >>> torch.allclose(texts.encode(texts.words(4)[None])[0, 0], given[0], atol=1e-6)
        True
    """

    order: Tensor
    start: Tensor
    prefix: Tensor
    ids: Tensor
    offset: Tensor
    last: Tensor
    owner: Tensor

    def __init__(
        self, clip: nn.Module, names: Sequence[str], template: str = "a photo of a {}.",
        tokenizer: Tokenizer | None = None, *, doubled_names: bool = False,
    ) -> None:  # fmt: skip
        """Look up the tokens.

        Args:
            clip: A ``CLIP`` or ``CustomTextCLIP`` of open_clip, with a causal text tower.
            names: Names of the classes, in the order of the logits.
            template: Text with ``{}`` where the name stands. The prompt takes the place of what comes before it.
            tokenizer: The model's; None: CLIP's own.
            doubled_names: Accept the name of two classes: CLIP's own names of ImageNet have "missile" and "sunglasses"
                twice.

        Raises:
            SettingError: a text tower that is no tree; names that are missing, doubled or no words; a template without
                ``{}``; a text that is longer than the context.
        """
        super().__init__()
        check_class_names(names, doubled=doubled_names)
        if template.count("{}") != 1:
            remedy = 'Write, for example, "a photo of a {}."'
            raise SettingError("template", template, "does not have `{}` once, where the class name stands.", remedy)
        tower = causal_tower(clip)
        self.names, self.template = tuple(names), template
        self.token_embedding, self.positional_embedding = tower.token_embedding, tower.positional_embedding
        self.transformer, self.ln_final = tower.transformer, tower.ln_final
        self.text_projection = tower.text_projection
        self.context, self.width = int(tower.context_length), int(tower.positional_embedding.shape[1])
        prefix, endings = _tokens(self.names, template, tokenizer or _default_tokenizer(), tower)
        order = sorted(range(len(endings)), key=lambda c: len(endings[c]))
        self.lengths = tuple(len(endings[c]) for c in order)
        buffers = {
            "order": order,
            "start": prefix[:1],
            "prefix": prefix[1:],
            "ids": [token for c in order for token in endings[c]],
            "offset": [place for length in self.lengths for place in range(length)],
            "last": list(accumulate(self.lengths, initial=-1))[1:],
            "owner": [rank for rank, length in enumerate(self.lengths) for _ in range(length)],
        }
        for name, values in buffers.items():
            on_device = torch.tensor(values, dtype=torch.long, device=self.positional_embedding.device)
            self.register_buffer(name, on_device, persistent=False)
        self.check(0)

    def check(self, tokens: int, *, prompt: bool = True) -> None:
        """Raise a :class:`SettingError` if so many tokens, of a prompt or the template, leave no room for a class."""
        room, longest = self.context - 1 - self.lengths[-1], self.names[int(self.order[-1])]
        if tokens <= room:
            return
        if not prompt or room <= 0:
            problem = (
                f"takes {tokens + 1 + self.lengths[-1]} tokens in its caption, and the context has {self.context}."
            )
            raise SettingError("class_names", longest, problem, "Shorten the name or the template.")
        raise SettingError(
            "text_prompt.tokens", tokens, f"the text of the class {longest!r} takes {self.lengths[-1]} tokens "
            f"after the prompt, and the context of the text tower has {self.context}.",
            f"Write {room} or less, or shorten the name.",
        )  # fmt: skip

    def words(self, tokens: int) -> Tensor:
        """``(tokens, w)`` embeddings of the words before the name; repeated, so that they end right before it."""
        if not len(self.prefix):
            problem = "has no words before the name, with which the prompt could start."
            raise SettingError("template", self.template, problem, "Add some, or write init: zeros.")
        repeated = self.prefix.repeat(-(-tokens // len(self.prefix)))[-tokens:] if tokens else self.prefix[:0]
        return self.token_embedding(repeated).detach()

    def encode(self, prompts: Tensor) -> Tensor:
        """Unit features of all classes for each prompt.

        Args:
            prompts: ``(m, n, w)`` tokens that stand before the names.

        Returns:
            ``(m, c, e)`` features of length 1, float32 at least.

        Raises:
            SettingError: prompt and text are longer than the context.
        """
        self.check(prompts.shape[1])
        parts = []
        for tokens, classes in self.sequences():
            length = 1 + prompts.shape[1] + tokens.stop - tokens.start
            some = prompts.split(max(1, TOKENS_AT_ONCE // length))
            parts.append(torch.cat([self._encode_group(each, tokens, classes) for each in some]))
        return torch.cat(parts, 1).index_select(1, self.order.argsort())

    def sequences(self) -> Iterator[tuple[slice, slice]]:
        """Tokens and classes, by place in their order, of each sequence."""
        first = 0
        for start in range(0, len(self.lengths), CLASSES_AT_ONCE):
            lengths = self.lengths[start : start + CLASSES_AT_ONCE]
            yield slice(first, first + sum(lengths)), slice(start, start + len(lengths))
            first += sum(lengths)

    def _encode_group(self, prompts: Tensor, tokens: slice, classes: slice) -> Tensor:
        (m, n, _), dtype = prompts.shape, self.transformer.get_cast_dtype()
        start, endings = (self.token_embedding(ids).expand(m, -1, -1) for ids in (self.start, self.ids[tokens]))
        x = torch.cat([start, prompts.to(start), endings], 1).to(dtype)
        owner = torch.cat([self.owner.new_full((1 + n,), -1), self.owner[tokens]])
        place = torch.cat([torch.arange(1 + n, device=owner.device), 1 + n + self.offset[tokens]])
        seen = ((owner[:, None] == owner) | (owner == -1)).tril()
        mask = torch.zeros(seen.shape, dtype=dtype, device=x.device).masked_fill_(~seen, -torch.inf)
        x = x + self.positional_embedding[place].to(dtype)  # under one name: one of the two is kept while layers run
        x = self.transformer(x, attn_mask=mask)
        x = self.ln_final(x.index_select(1, 1 + n + self.last[classes] - tokens.start))
        if isinstance(self.text_projection, nn.Linear):
            x = self.text_projection(x)
        elif self.text_projection is not None:
            x = x @ self.text_projection
        return normalize(at_least_float32(x), dim=-1)


def check_class_names(names: Sequence[str], *, doubled: bool = False) -> None:
    """Raise a :class:`SettingError` if names are missing, numbers, WordNet ids or, unless allowed, doubled."""
    remedy = "Give the names that a caption would use, in the order of the classes."
    if not names:
        raise SettingError("class_names", [], "names no class.", remedy)
    seen: set[str] = set()
    for name in names:
        plain = str(name).strip().lower()
        problem = (
            "is empty." if not plain
            else "is a number, and CLIP knows classes by words." if plain.replace(".", "").isdigit()
            else "is a WordNet id, and CLIP knows classes by words." if re.fullmatch(r"n\d{8}", plain)
            else "is the name of two classes, whose texts would be the same." if plain in seen and not doubled else ""
        )  # fmt: skip
        if problem:
            either = f"{remedy[:-1]}, or doubled_names=True." if "two classes" in problem else remedy
            raise SettingError("class_names", name, problem, either)
        seen.add(plain)


def causal_tower(clip: nn.Module) -> Any:
    """The text tower of a CLIP, where its texts can be encoded as a tree.

    Raises:
        SettingError: it lets a text see what comes after, or reads its feature elsewhere than at the end token.
    """
    tower: Any = getattr(clip, "text", clip)
    remedy = "Leave the text prompt out (features of the texts: class_features); an image prompt still works."
    parts = ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection")
    if any(not hasattr(tower, part) for part in parts) or not hasattr(tower.transformer, "resblocks"):
        raise SettingError("text_prompt", type(tower).__name__, "is not a text tower of open_clip.", remedy)
    mask = getattr(tower, "attn_mask", None)
    if mask is None or not torch.equal(mask == 0, torch.ones_like(mask, dtype=torch.bool).tril()):
        problem = "has a text tower that is not causal, so texts with the same beginning share nothing."
        raise SettingError("text_prompt", type(clip).__name__, problem, remedy)
    pool = _pool_type(tower)
    if pool not in ("argmax", "eos") or getattr(tower, "cls_emb", None) is not None:
        problem = f"has a text tower that pools otherwise ({pool!r}) than at the end token."
        raise SettingError("text_prompt", type(clip).__name__, problem, remedy)
    return tower


def class_features(
    clip: Any, names: Sequence[str], templates: Sequence[str] = ("a photo of a {}.",),
    tokenizer: Tokenizer | None = None, *, doubled_names: bool = False,
) -> Tensor:  # fmt: skip
    """``(c, e)`` unit features of classes without a prompt, by ``clip.encode_text``: any tower of open_clip.

    With several templates the mean of their unit features, as in CLIP's own ensembles.

    Raises:
        SettingError: names that are missing, doubled or no words; a text that is longer than the context.
    """
    check_class_names(names, doubled=doubled_names)
    tokenizer, device = tokenizer or _default_tokenizer(), next(clip.parameters()).device
    context = int(clip.context_length)
    with torch.no_grad():
        rows = [[t.replace("{}", name) for name in names] for t in templates]
        for texts in rows:  # tokenizers cut what is too long without a word
            longer = tokenizer(texts, context_length=2 * context)
            cut = (longer[:, context:] != longer[:, -1:]).any(1)
            if bool(cut.any()):
                problem = f"takes more tokens in its caption than the {context} of the context."
                remedy = "Shorten the name or the template."
                raise SettingError("class_names", names[int(cut.int().argmax())], problem, remedy)
        of_each = [clip.encode_text(tokenizer(texts, context_length=context).to(device)) for texts in rows]
        return normalize(torch.stack([normalize(at_least_float32(x), dim=-1) for x in of_each]).mean(0), dim=-1)


@torch.no_grad()
def template_features(
    clip: Any, names: Sequence[str], templates: Sequence[str], tokenizer: Tokenizer | None = None, *,
    doubled_names: bool = False,
) -> Tensor:  # fmt: skip
    """The same as :func:`class_features`, each template as a tree where the text tower is one."""
    doubled = doubled_names
    try:
        trees = [ClassTexts(clip, names, template, tokenizer, doubled_names=doubled) for template in templates]
    except SettingError as error:
        if error.setting not in ("text_prompt", "template"):
            raise
        return class_features(clip, names, templates, tokenizer, doubled_names=doubled)
    for texts in trees:
        texts.check(len(texts.prefix), prompt=False)
    words = (texts.token_embedding(texts.prefix)[None] for texts in trees)
    of_each = [texts.encode(before)[0] for texts, before in zip(trees, words, strict=True)]
    return normalize(torch.stack(of_each).mean(0), dim=-1)


def _pool_type(tower: Any) -> str:
    # A `CLIP` keeps its text tower's settings under another name than the tower itself.
    return str(getattr(tower, "text_pool_type", getattr(tower, "pool_type", "")))


@cache
def _default_tokenizer() -> Tokenizer:  # reading its vocabulary takes a second
    open_clip = import_extra("open_clip", extra="clip", setting="tokenizer", value="CLIP's")
    tokenizer: Tokenizer = open_clip.SimpleTokenizer()
    return tokenizer


def _tokens(names: Sequence[str], template: str, tokenizer: Tokenizer, tower: Any) -> tuple[list[int], list[list[int]]]:
    """Ids of the start token and of the words before the name; and, for each class, of the rest to its end token."""
    end = getattr(tower, "text_eos_id", getattr(tower, "eos_id", None)) if _pool_type(tower) == "eos" else None

    def rows(texts: list[str]) -> list[list[int]]:
        # With room to spare: tokenizers cut what is longer than they are told, without a word.
        ids = tokenizer(texts, context_length=4 * int(tower.context_length))
        last = (ids == end).int().argmax(1) if end is not None else ids.argmax(1)
        return [row[: i + 1] for row, i in zip(ids.tolist(), last.tolist(), strict=True)]

    before = template.partition("{}")[0].strip()
    (words,) = rows([before])
    prefix, endings = words[:-1], []
    for name, row in zip(names, rows([template.replace("{}", name) for name in names]), strict=True):
        if row[: len(prefix)] != prefix:
            problem = f"is cut into other tokens before the name {name!r} than alone."
            raise SettingError("template", template, problem, "Put a space before {}, or leave the text prompt out.")
        endings.append(row[len(prefix) :])
    return prefix, endings
