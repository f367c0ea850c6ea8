import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

from flops_lightning.datamodules import JsonlTextDataModule
from flops_lightning.errors import SettingError

FORM = {"template": "{text} It was", "choices": ["~t", "~g"]}
WORDS = "abcdefghij"


class Letters:
    """A tokenizer with a token for each letter and one for the beginning."""

    chat_template: str | None = "chat"

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [*([1] if add_special_tokens else []), *(ord(c) for c in text)]}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [chr(i) for i in ids]

    def apply_chat_template(self, messages: Any, tokenize: bool, add_generation_prompt: bool = False) -> str:
        if any(m["role"] not in ("user", "assistant") for m in messages):
            raise RuntimeError("no such role")
        text = "".join(f"<{m['role'][0]}>{m['content']}" for m in messages)
        return text + "<a>" * add_generation_prompt


def written(folder: Path, lines: list[Any], name: str = "texts.jsonl") -> str:
    file = folder / name
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(file)


def reviews(folder: Path, name: str = "reviews.jsonl") -> str:
    lines = [{"text": word, "label": i % 2} for i, word in enumerate(WORDS)]
    return written(folder, [*lines, ""], name)  # a line at the end


def made(file: str, **settings: Any) -> JsonlTextDataModule:
    data = JsonlTextDataModule(train_file=file, **{"tokenizer": Letters(), **settings})
    data.setup("fit")
    return data


def read(data: JsonlTextDataModule, part: str = "train") -> list[str]:
    texts = getattr(data, f"{part}_set").texts
    return ["".join(map(chr, [*t.prompt[1:], ord("|"), *t.candidates[t.label]])) for t in texts]


def test_prompts_and_completions_become_padded_batches(tmp_path: Path):
    data = made(written(tmp_path, [{"prompt": "ab", "completion": "cd"}, {"prompt": "", "completion": "x"}]))
    inputs, targets = data.collate(data.train_set.texts)
    assert inputs["input_ids"].tolist() == [[1, 97, 98, 99], [1, 0, 0, 0]]
    assert targets["tokens"].tolist() == [[[99, 100]], [[120, -100]]]
    assert targets["positions"].tolist() == [[[2, 3]], [[0, 0]]]
    assert (data.branching, data.choices, data.val_dataloader()) == (False, (), [])


def test_the_last_answer_of_a_conversation_is_the_completion(tmp_path: Path):
    talk = [
        {"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ]
    file = written(tmp_path, [{"messages": talk}])
    data = made(file)
    assert read(data) == ["u>a<a>b<u>c<a>|d"]  # the first token is that of the template, and no other
    tokenizer = Letters()
    tokenizer.chat_template = None
    with pytest.raises(SettingError, match=r"texts\.jsonl.*line 1 has messages, and the tokenizer no chat template"):
        made(file, tokenizer=tokenizer)
    with pytest.raises(SettingError, match=r"line 1 is refused by the tokenizer's chat template \(no such role\)"):
        made(written(tmp_path, [{"messages": [{"role": "system", "content": "x"}, talk[-1]]}]))


def test_an_answer_is_found_where_a_template_ends_prompts_in_a_way_of_its_own(tmp_path: Path):
    class Thinking(Letters):
        def apply_chat_template(self, messages: Any, tokenize: bool, add_generation_prompt: bool = False) -> str:
            text = super().apply_chat_template(messages, tokenize, add_generation_prompt)
            return text + ("<think>" if add_generation_prompt else "<end>")

    talk = [{"role": "user", "content": "end?"}, {"role": "assistant", "content": "end"}]
    data = made(written(tmp_path, [{"messages": talk}]), tokenizer=Thinking())
    assert read(data) == ["u>end?<a>|end<end>"]  # neither the question's word nor that of the template


def test_what_ends_a_line_elsewhere_is_text_here(tmp_path: Path):
    file = tmp_path / "texts.jsonl"
    file.write_bytes('\ufeff{"prompt": "a", "completion": "b\u2028c\x85"}\r\n\r\n'.encode())
    assert read(made(str(file))) == ["a|b\u2028c\x85"]


def test_labels_are_numbers_or_choices_and_templates_name_fields(tmp_path: Path):
    lines = [{"a": "x", "b": "y", "label": 0}, {"a": "v", "b": "w", "label": "no"}]
    data = made(written(tmp_path, lines), template="{b} and {a}?", choices=["=yes", "no"])
    assert read(data) == ["y and x?|=yes", "w and v?|no"]
    assert data.branching
    assert not made(reviews(tmp_path), template="{text}", choices=["t", "g"]).branching


@pytest.mark.parametrize("seed", [0, 1])
def test_shots_are_as_many_of_each_label_and_validation_has_others(seed, tmp_path: Path):
    file = reviews(tmp_path)
    data = made(file, **FORM, shots=2, val_texts=4, split_seed=seed)
    train, val = read(data), read(data, "val")
    assert [line[-1] for line in train].count("g") == 2
    assert len(train) == 4
    assert len({line[0] for line in [*train, *val]}) == 8
    assert read(made(file, **FORM, shots=2, val_texts=4, split_seed=seed)) == train
    assert read(made(file, **FORM, shots=2, val_texts=4, split_seed=seed + 2)) != train
    assert len(read(made(file, **FORM, train_texts=3))) == 3


def test_training_batches_are_a_function_of_the_seed_and_test_batches_in_order(tmp_path: Path):
    data = made(reviews(tmp_path), test_file=reviews(tmp_path, "test.jsonl"), batch_size=4, **FORM)
    batches = []
    for _ in range(2):
        seed_everything(3, verbose=False)
        batches.append([inputs["input_ids"] for inputs, _ in data.train_dataloader()])
    assert [len(ids) for ids in batches[0]] == [4, 4, 2]
    assert all(map(torch.equal, *batches))
    first = torch.cat([inputs["input_ids"][:, 1] for inputs, _ in data.test_dataloader()])
    assert "".join(map(chr, first)) == WORDS
    assert first.tolist() != torch.cat([ids[:, 1] for ids in batches[0]]).tolist()


def test_texts_that_are_cut_are_counted_and_said(tmp_path: Path, caplog):
    lines = [{"prompt": "abcdef", "completion": "xy"}, {"prompt": "a", "completion": "b"}]
    with caplog.at_level("INFO"):
        data = made(written(tmp_path, lines), max_tokens=5)
    assert read(data) == ["ef|xy", "a|b"]
    assert data.truncated == 1
    assert "data.max_tokens = 5: 1 of 2 texts were cut" in caplog.text


class Model:
    def __init__(self, context: int = 0, vocabulary: int = 0):
        self.tokenizer, self.context, self.vocabulary = Letters(), context, vocabulary


def with_model(file: str, model: Model, **settings: Any) -> JsonlTextDataModule:
    data = JsonlTextDataModule(train_file=file, **settings)
    data.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    data.trainer.strategy._lightning_module = model  # type: ignore[assignment]
    data.setup("fit")
    return data


def test_the_models_tokenizer_context_and_vocabulary_count(tmp_path: Path):
    file = written(tmp_path, [{"prompt": "a", "completion": "b"}, {"prompt": "abcde", "completion": "xy"}])
    assert read(with_model(file, Model(8, 200)))[1] == "abcde|xy"
    with pytest.raises(SettingError, match=r"line 2 has 8 tokens, and the model's context 7.*max_tokens: 7 to cut"):
        with_model(file, Model(7))
    with pytest.raises(SettingError, match=r"data\.train_file = .*line 2"):  # also where it is held out
        with_model(file, Model(7), val_texts=1, split_seed=1)
    with pytest.raises(SettingError, match=r"max_tokens = 9: is more than the model's context of 7"):
        with_model(file, Model(7), max_tokens=9)
    with pytest.raises(SettingError, match=r"gives the token 121, and the model has an embedding of 100 tokens"):
        with_model(file, Model(8, 100))
    with pytest.raises(SettingError, match=r"data\.tokenizer = '': there is no model whose tokenizer"):
        JsonlTextDataModule(train_file=file).setup("fit")


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (["ta", "tb"], "'ta' is t | a, 'tb' is t | b; some share their first token"),
        ([" a", "b"], "some begin with a space and some do not"),
        (["a", "b"], "no space is between the template and a choice"),
        ([" a", " b"], "some share their first token; each is scored over all its tokens"),
    ],
)
def test_choices_show_their_tokens(choices, message, tmp_path: Path, caplog):
    with caplog.at_level("INFO"):
        made(reviews(tmp_path), template="{text} It was", choices=choices)
    assert message in caplog.text


@pytest.mark.parametrize(
    ("lines", "settings", "message"),
    [
        (["{"], {}, r"train_file.*line 1 is not JSON"),
        ([{"prompt": "a", "completion": "b"}, [1]], {}, "line 2 is a list"),
        ([{"prompt": "a"}], {}, r"line 1 has no text 'completion', only \['prompt'\]"),
        ([{"prompt": "a", "completion": " "}], {}, "line 1 has an empty completion"),
        (
            [{"prompt": "\U0001f600", "completion": "b"}, {"prompt": "\ud83d", "completion": "b"}],
            {},
            "line 2 has half a",
        ),
        ([{"messages": "x"}], {}, "line 1 has messages that are no list"),
        ([{"messages": [{"role": "user", "content": "x"}]}], {}, "whose last is no answer"),
        ([], {}, "has no entries"),
        ([{"text": "a"}], FORM, r"line 1 has no 'label', only \['text'\]. Write the fields \['text', 'label'\]"),
        ([{"text": "a", "label": 2}], FORM, "has the label 2, which is neither 0 to 1 nor one of"),
        ([{"text": " ", "label": 1}], FORM, "line 1 is empty"),
        ([{"text": None, "label": 1}], FORM, "line 1 has None for 'text', which is no text or number"),
        ([{"text": ["a"], "label": 1}], FORM, r"line 1 has \['a'\] for 'text', which is no text or number"),
        ([{"text": "a", "label": 1}], {**FORM, "shots": 1}, r"shots = 1: is more than the 0 texts of the label 0"),
        ([{"text": "a", "label": 1}], {**FORM, "val_texts": 1}, r"val_texts = 1: is more than the 0 texts"),
        ([{"prompt": "a", "completion": "b"}], {"shots": 1}, r"shots = 1: has no effect: there are no labels"),
        ([], {"template": "{text}"}, r"data\.template = '{text}': has no effect alone"),
        ([], {"template": "text", "choices": ["a", "b"]}, "names no field"),
        ([], {"template": "{text", "choices": ["a", "b"]}, "is not a valid template"),
        ([], {"template": "{text}", "choices": ["a", " a"]}, "must be two texts or more, all different"),
        ([{"text": "x", "label": 1}], {**FORM, "choices": ["a", "ab"]}, r"'a' begins 'ab', so it is never less likely"),
        ([], {"val_file": "x", "val_texts": 3}, "has no effect beside val_file"),
        ([], {"shots": 3, "train_texts": 3, **FORM}, "Choose one of the two"),
        ([], {"max_tokens": -1}, r"data\.max_tokens = -1"),
        ([], {"max_tokens": 1}, r"data\.max_tokens = 1: leaves room for a token that nothing comes before"),
    ],
)
def test_a_mistake_is_named_with_its_file_and_line(lines, settings, message, tmp_path: Path):
    with pytest.raises(SettingError, match=message):
        made(written(tmp_path, lines), **settings)


def test_missing_files_are_named(tmp_path: Path):
    with pytest.raises(SettingError, match=r"data\.train_file = .*nowhere.* cannot be read"):
        made(str(tmp_path / "nowhere"))
    with pytest.raises(SettingError, match=r"data\.test_file = None: there are no texts to test with"):
        made(reviews(tmp_path), **FORM).test_dataloader()
    with pytest.raises(SettingError, match=r"data\.val_file = None: there are no texts to validate with.*val_texts"):
        made(reviews(tmp_path), **FORM).setup("validate")
