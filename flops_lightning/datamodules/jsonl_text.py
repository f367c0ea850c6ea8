"""Texts of your own, as JSON lines, for language models."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import permutations, takewhile
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from flops_lightning.datamodules.loading import KeyedLoaders
from flops_lightning.datamodules.splits import check_split_seed
from flops_lightning.datamodules.text_files import LabelledForm, TextEntry, read_texts
from flops_lightning.errors import SettingError, check_whole
from flops_lightning.language.encoding import EncodedText, branches, encode, pack
from flops_lightning.language.models import load_tokenizer

PARTS = ("train", "val", "test")


class TextSet(Dataset[EncodedText]):
    """Encoded texts."""

    def __init__(self, texts: Sequence[EncodedText]) -> None:
        self.texts = list(texts)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, place: int) -> EncodedText:
        return self.texts[place]


class JsonlTextDataModule(KeyedLoaders):
    r"""Texts from files of JSON lines, tokenised by the model's tokenizer.

    A line has one of three forms. ``{"prompt", "completion"}``. ``{"messages"}``: the last message, of the role
    ``assistant``, is the completion, and the tokenizer's chat template formats the rest. Or, with ``template`` and
    ``choices``, the fields that the template names and a ``label``: a number from 0, or one of the choices. Batches are
    made by :func:`~flops_lightning.language.pack` and padded to their longest text.

    Attributes:
        content: By what a checkpoint knows the texts that are trained on: their number and a hash; after :meth:`setup`.
        truncated: Number of texts that ``max_tokens`` cut.

    Args:
        train_file: Training texts.
        val_file: Validation texts; None: ``val_texts`` of the training file, or none.
        test_file: Texts for testing and prediction; None: none.
        template: The prompt of a text with a label, such as ``{text} It was``.
        choices: Completions to choose from, in the order of the labels, such as ``[" terrible", " great"]``.
        train_texts: Number of training texts; 0: all.
        shots: Number of training texts per label; 0: all.
        val_texts: Number of texts of the training file to hold out for validation.
        split_seed: Seed for choosing the texts of the three settings above.
        max_tokens: Cut longer texts, and log how many: a prompt loses its oldest tokens except the first; 0: a text
            longer than the model's context is an error.
        tokenizer: A tokenizer, or its name or folder; empty: the model's.
        batch_size: Texts per batch.
        num_workers: Number of worker processes of the data loaders.

    Raises:
        SettingError: a file is not as above (its line is named), or a setting has no effect.

    Example:
        >>> import json, tempfile
        >>> from pathlib import Path
        >>> file = Path(tempfile.mkdtemp()) / "reviews.jsonl"
        >>> lines = [{"text": "A joy.", "label": 1}, {"text": "Two lost hours.", "label": 0}]
        >>> _ = file.write_text("\n".join(map(json.dumps, lines)))
        >>> form = {"template": "{text} It was", "choices": [" terrible", " great"]}
        >>> data = JsonlTextDataModule(train_file=str(file), **form)
        >>> [(entry.prompt, entry.candidates[entry.label]) for entry in data.check()["train"]]
        [('A joy. It was', ' great'), ('Two lost hours. It was', ' terrible')]
    """

    content: str | None = None

    def __init__(
        self, *, train_file: str, val_file: str | None = None, test_file: str | None = None,
        template: str | None = None, choices: Sequence[str] | None = None, train_texts: int = 0, shots: int = 0,
        val_texts: int = 0, split_seed: int = 0, max_tokens: int = 0, tokenizer: Any = "", batch_size: int = 16,
        num_workers: int = 0,
    ) -> None:  # fmt: skip
        """Check the settings; the files are read by :meth:`check`."""
        super().__init__(batch_size=batch_size, num_workers=num_workers)
        self.files = {"train": train_file, "val": val_file, "test": test_file}
        if (template is None) != (choices is None):
            name, value = ("template", template) if choices is None else ("choices", choices)
            remedy = 'Write both, for example template: "{text} It was" and choices: [" terrible", " great"].'
            raise SettingError(f"data.{name}", value, "has no effect alone.", remedy)
        self.form = None if template is None else LabelledForm(template, tuple(choices or ()))
        numbers = {"train_texts": train_texts, "shots": shots, "val_texts": val_texts, "max_tokens": max_tokens}
        for name, number in numbers.items():
            check_whole(f"data.{name}", number, 0, "Write a number, or 0.")
        if max_tokens == 1:
            problem = "leaves room for a token that nothing comes before."
            raise SettingError("data.max_tokens", max_tokens, problem, "Write 2 or more, or 0.")
        check_split_seed(split_seed)
        if shots and self.form is None:
            problem = "has no effect: there are no labels."
            raise SettingError("data.shots", shots, problem, "Write train_texts, or give template and choices.")
        if shots and train_texts:
            raise SettingError("data.shots", shots, "train_texts is given as well.", "Choose one of the two.")
        if val_texts and val_file is not None:
            raise SettingError("data.val_texts", val_texts, "has no effect beside val_file.", "Choose one of the two.")
        self.train_file, self.val_file, self.test_file, self.template = train_file, val_file, test_file, template
        self.train_texts, self.shots, self.val_texts = train_texts, shots, val_texts
        self.split_seed, self.max_tokens, self.tokenizer = split_seed, max_tokens, tokenizer
        self.truncated, self._branching = 0, False
        self._encoded: dict[str, list[EncodedText]] | None = None

    @property
    def choices(self) -> tuple[str, ...]:
        """What is chosen from; empty for completions."""
        return () if self.form is None else self.form.choices

    @property
    def branching(self) -> bool:
        """Whether batches need a mask: there are choices, one of them of several tokens; known after :meth:`setup`."""
        return self._branching

    def check(self) -> Mapping[str, list[TextEntry]]:
        """Read the files and choose the texts of each part."""
        read = {
            part: read_texts(f"data.{part}_file", file, self.form)
            for part, file in self.files.items()
            if file is not None
        }
        train = read["train"]
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(self.split_seed)).tolist()
        if self.val_texts:
            self._check_enough("val_texts", self.val_texts, len(train) - 1)
            read["val"], order = [train[i] for i in order[: self.val_texts]], order[self.val_texts :]
        if self.train_texts:
            self._check_enough("train_texts", self.train_texts, len(order))
            order = order[: self.train_texts]
        if self.shots:
            of_label = [[i for i in order if train[i].label == label] for label in range(len(self.choices))]
            fewest = min(range(len(of_label)), key=lambda label: len(of_label[label]))
            self._check_enough("shots", self.shots, len(of_label[fewest]), f" of the label {fewest}")
            order = [i for places in of_label for i in places[: self.shots]]
        return {**read, "train": [train[i] for i in sorted(order)]}

    def _check_enough(self, name: str, asked: int, there: int, of: str = "") -> None:
        if asked > there:
            problem = f"is more than the {there} texts{of} that are left of {self.files['train']}."
            raise SettingError(f"data.{name}", asked, problem, f"Write {there} or less.")

    def setup(self, stage: str) -> None:
        """Read and tokenise the texts, once."""
        if self._encoded is None:
            task = getattr(self.trainer, "lightning_module", None)
            tokenizer = self._tokenizer(task)
            read, self.truncated = self.check(), 0
            self.content = _content(read["train"])
            encoded = {
                part: [self._encode(tokenizer, part, entry, getattr(task, "context", 0)) for entry in entries]
                for part, entries in read.items()
            }
            self._check_vocabulary(encoded, getattr(task, "vocabulary", 0))
            if self.truncated:
                count = sum(map(len, encoded.values()))
                rank_zero_info(f"data.max_tokens = {self.max_tokens}: {self.truncated} of {count} texts were cut.")
            if self.choices:
                self._say_choices(tokenizer, encoded["train"][0])
            self._encoded, self._branching = encoded, any(map(branches, encoded.values()))
        if stage == "validate" and "val" not in self._encoded:
            problem = "there are no texts to validate with."
            raise SettingError("data.val_file", None, problem, "Give a file, or write val_texts.")
        for part in PARTS:
            if part in self._encoded:
                setattr(self, f"{part}_set", TextSet(self._encoded[part]))

    def collate(self, samples: list[EncodedText]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """See :func:`~flops_lightning.language.pack`."""
        return pack(samples, branching=self.branching)

    def val_dataloader(self) -> Any:
        """Validation batches, in a fixed order; none without texts to validate with."""
        return super().val_dataloader() if "val" in (self._encoded or {}) else []

    def test_dataloader(self) -> DataLoader[Any]:
        """Test batches, in a fixed order."""
        if "test" not in (self._encoded or {}):
            raise SettingError("data.test_file", None, "there are no texts to test with.", "Give a file.")
        return super().test_dataloader()

    def predict_dataloader(self) -> DataLoader[Any]:
        """The test batches again."""
        return self.test_dataloader()

    def _tokenizer(self, task: Any) -> Any:
        if isinstance(self.tokenizer, str) and self.tokenizer:
            return load_tokenizer(self.tokenizer, setting="data.tokenizer")
        found = self.tokenizer or getattr(task, "tokenizer", None)
        if found is None:
            problem = "there is no model whose tokenizer could be taken."
            raise SettingError("data.tokenizer", self.tokenizer, problem, "Give a name, a folder or a tokenizer.")
        return found

    def _encode(self, tokenizer: Any, part: str, entry: TextEntry, context: int) -> EncodedText:
        prompt, special = entry.prompt, True
        candidates: Sequence[str] = entry.candidates
        own = part if self.files.get(part) else "train"
        setting, file = f"data.{own}_file", self.files[own]
        try:
            if not isinstance(prompt, str):
                prompt, candidates = _through_template(tokenizer, prompt, candidates[0])
                special = False
            text = encode(tokenizer, prompt, candidates, entry.label, special=special)
        except ValueError as error:
            remedy = "Write a prompt and a completion, or take a tokenizer of a chat model for messages."
            raise SettingError(setting, file, f"{entry.place} {error}.", remedy) from error
        if self.max_tokens and context and self.max_tokens > context:
            problem = f"is more than the model's context of {context} tokens."
            raise SettingError("data.max_tokens", self.max_tokens, problem, f"Write {context} or less.")
        if self.max_tokens and text.tokens > self.max_tokens:
            self.truncated += 1
            return text.truncated(self.max_tokens)
        if context and text.tokens > context:
            problem = f"{entry.place} has {text.tokens} tokens, and the model's context {context}."
            raise SettingError(setting, file, problem, f"Shorten it, or write data.max_tokens: {context} to cut texts.")
        return text

    def _check_vocabulary(self, encoded: Mapping[str, list[EncodedText]], vocabulary: int) -> None:
        if not vocabulary:
            return
        texts = (text for part in encoded.values() for text in part)
        largest = max(max(*text.prompt, *map(max, text.candidates)) for text in texts)
        if largest >= vocabulary:
            problem = f"gives the token {largest}, and the model has an embedding of {vocabulary} tokens."
            raise SettingError("data.tokenizer", self.tokenizer or "the model's", problem, "Give the model's own.")

    def _say_choices(self, tokenizer: Any, text: EncodedText) -> None:
        """Show the tokens of the choices where they are not one each; refuse those that cannot be told apart."""
        tokens = [tokenizer.convert_ids_to_tokens(ids) for ids in text.candidates]
        shown = ", ".join(f"{word!r} is {' | '.join(ids)}" for word, ids in zip(self.choices, tokens, strict=True))
        for (one, ids), (other, more) in permutations(zip(self.choices, text.candidates, strict=True), 2):
            if more[: len(ids)] == ids:
                problem = f"{one!r} begins {other!r}, so it is never less likely ({shown})."
                raise SettingError("data.choices", list(self.choices), problem, "Write words that differ earlier.")
        notes = []
        if len({ids[0] for ids in text.candidates}) < len(text.candidates):
            notes.append("some share their first token")
        if len({word[:1].isspace() for word in self.choices}) > 1:
            notes.append("some begin with a space and some do not")
        elif not (self.choices[0][:1].isspace() or (self.form and self.form.template[-1:].isspace())):
            notes.append("no space is between the template and a choice")
        if notes or max(map(len, tokens)) > 1:
            rank_zero_info("; ".join([f"data.choices: {shown}", *notes, "each is scored over all its tokens"]) + ".")


def _content(texts: Sequence[TextEntry]) -> str:
    told = json.dumps([(text.prompt, text.candidates, text.label) for text in texts])
    return f"{len(texts)} texts, {hashlib.sha256(told.encode()).hexdigest()[:12]}"


def _through_template(tokenizer: Any, prompt: list[dict[str, str]], answer: str) -> tuple[str, list[str]]:
    """The text before an answer and from there on, as the tokenizer's chat template writes them."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("has messages, and the tokenizer no chat template")
    last = {"role": "assistant", "content": answer}
    try:
        before = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template([*prompt, last], tokenize=False)
    except Exception as error:  # a template refuses roles by an error of its own
        raise ValueError(f"is refused by the tokenizer's chat template ({error})") from error
    if not whole.startswith(before):  # a template may end a prompt otherwise than before an answer that is there
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, whole, strict=False)))
        place = whole.find(answer.strip(), shared)
        if place < 0:
            raise ValueError("has an answer that the tokenizer's chat template does not repeat")
        before = whole[:place]
    return before, [whole[len(before) :]]
