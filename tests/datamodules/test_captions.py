"""Photos with captions: what a file must hold, which parts photos go to, what a batch is, and features on disk."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flops_lightning.datamodules import CaptionDataModule
from flops_lightning.datamodules.caption_files import read_entries
from flops_lightning.errors import DamagedImageError, SettingError
from tests.datamodules.photo_folders import photo, write, write_class_folders

WORDS = ["a", "small", "dog", "runs", "over", "the", "very", "green", "grass", "of", "home"]


class ByWord:
    """One token a word, the word's length."""

    def __init__(self, caption_context: int = 0, *, reads_instructions: bool = False) -> None:
        self.caption_context, self.reads_instructions = caption_context, reads_instructions

    def caption_ids(self, captions: Sequence[str]) -> list[list[int]]:
        return [[len(word) for word in caption.split()] for caption in captions]


def entry(number: int, **changed: Any) -> dict[str, Any]:
    caption = " ".join(WORDS[: 2 + number % 9])
    said = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": caption}]
    usual = {"id": f"p{number}", "image": f"p{number}.jpg", "conversations": said}
    return {**usual, "captions": [caption, "again", f"photo {number}"], **changed}


def write_photos(root: Path, entries: Sequence[dict[str, Any]] | None = None, photos: int = 20) -> Path:
    for number in range(photos):
        write(root / f"p{number}.jpg", photo(number % 10, number % 9))
    (root / "captions.json").write_text(json.dumps(entries or [entry(n) for n in range(photos)]))
    return root


def module(root: Path, reader: Any = None, **settings: Any) -> CaptionDataModule:
    usual = {"normalization": "inception", "image_size": 8, "val_share": 0.2, "test_share": 0.2, "batch_size": 6}
    data = CaptionDataModule(root=str(root), captions=str(root / "captions.json"), **{**usual, **settings})
    data.tokenizer = ByWord() if reader is None else reader
    return data


def prepared(root: Path, **settings: Any) -> CaptionDataModule:
    data = module(root, **settings)
    data.setup("fit")
    return data


def brightness(images: Tensor) -> Tensor:
    """Another number for each of the photos above."""
    return images.mean((2, 3)) @ torch.tensor([1.0, 10.0, 100.0])[:, None]


def test_a_batch_has_the_caption_of_each_photo_the_shortest_first(tmp_path):
    data = prepared(write_photos(tmp_path))
    seen = 0
    for images, captions in data.train_dataloader():
        assert list(captions.lengths) == sorted(captions.lengths)
        # By colour and number: see tests.datamodules.photo_folders.
        for image, tokens in zip(images, [captions.take(torch.tensor([i])) for i in range(len(captions))], strict=True):
            near = [(image.mean((1, 2)) - each[0].mean((1, 2))).abs().sum() for each in data.train_set.photos]
            number = int(Path(data.train_set.photos.files[int(torch.stack(near).argmin())]).stem[1:])
            assert tokens.trimmed()[0].tolist() == [len(word) for word in WORDS[: 2 + number % 9]]
            seen += 1
    assert seen == 12


def test_captions_of_a_photo_stay_in_one_part_whatever_the_number_of_entries(tmp_path):
    doubled = [entry(n) for n in range(20)] + [entry(n, id="again") for n in range(5)]
    data = prepared(write_photos(tmp_path, doubled), all_captions=True)
    parts = {part: getattr(data, f"{part}_set") for part in ("train", "val", "test")}
    photos = {part: {Path(file).name for file in found.photos.files} for part, found in parts.items()}
    assert [len(each) for each in photos.values()] == [12, 4, 4]
    assert len(set.union(*photos.values())) == 20
    assert sum(len(found) for found in parts.values()) == 3 * 25
    for part, found in parts.items():
        for place, number in zip(found.places.tolist(), found.captions.tolist(), strict=True):
            name = Path(found.photos.files[place]).name
            assert name in photos[part]
            if data.texts[number].startswith("photo"):
                assert name == f"p{data.texts[number].split()[1]}.jpg"
    assert set(data.instructions) == {"What is it?"}


def test_a_photo_is_one_however_its_path_is_written(tmp_path):
    """Under two paths it could be learned from and held out."""
    again = [entry(n, image=str(image)) for n in range(20) for image in (tmp_path / f"p{n}.jpg", f"./x/../p{n}.jpg")]
    root = write_photos(tmp_path, [entry(n) for n in range(20)] + again)
    data = prepared(root)
    files = [str(Path(file).resolve()) for listing in data.check().values() for file in listing.files]
    assert sorted(files) == sorted(str((root / f"p{n}.jpg").resolve()) for n in range(20))
    assert len(data.train_set) == 3 * 12


@pytest.mark.parametrize("outside", ["../p3.jpg", "p1.jpg/../../p3.jpg", "/elsewhere/p3.jpg"])
def test_a_photo_outside_of_the_folder_is_refused(tmp_path, outside):
    root = write_photos(tmp_path, [entry(0), entry(1, image=outside)])
    with pytest.raises(SettingError, match=rf"entry 1 \('p1'\): {outside} is outside of"):
        prepared(root)


def test_braces_beside_the_name_stay(tmp_path):
    write_class_folders(tmp_path, ("dog", "cat"), range(1))
    data = CaptionDataModule(root=str(tmp_path), template="{a} {} {0}")
    assert data.class_captions == ("{a} cat {0}", "{a} dog {0}")


def test_class_folders_serve_with_a_caption_for_each_class(tmp_path):
    for part in ("train", "test"):
        write_class_folders(tmp_path / part, ("big_ship", "truck"), range(5))
    usual = {"normalization": "inception", "image_size": 8, "val_share": 0.2}
    data = CaptionDataModule(root=str(tmp_path), template="a {} .", images_per_class=3, **usual)
    data.tokenizer = ByWord()
    data.setup("fit")
    assert data.class_captions == ("a big ship .", "a truck .")
    assert [len(getattr(data, f"{part}_set")) for part in ("train", "val", "test")] == [6, 2, 10]
    (batch,) = data.test_dataloader()
    assert batch[1].lengths.tolist() == [4] * 5 + [3] * 5
    assert batch[1].take(torch.tensor([9])).trimmed().tolist() == [[1, 5, 1]]


def test_batches_do_not_depend_on_what_was_drawn_before(tmp_path):
    data = prepared(write_photos(tmp_path))
    one = [captions.values for _, captions in data.train_dataloader()]
    torch.rand(3)
    two = [captions.values for _, captions in prepared(tmp_path, num_workers=1).train_dataloader()]
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def changed(value: Any, **also: Any) -> dict[str, Any]:
    return entry(1, conversations=value, **also)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (entry(1, image=None), r"captions.json.*entry 1 \('p1'\) has no image"),
        (changed("a"), "has no conversations"),
        (changed([{"from": "human", "value": "<image>"}]), "has 1 turns"),
        (changed([{"from": "human", "value": "?"}, {"from": "gpt", "value": "A."}]), "has 0 times <image>"),
        (changed([{"from": "human", "value": "<image>"}, {"from": "gpt", "value": " "}]), "has an empty caption"),
        (changed([{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "\ud83d"}]), "has half a character"),
        (entry(1, image="none.jpg"), r"entry 1 \('p1'\): .*none.jpg is missing"),
    ],
)
def test_an_entry_that_cannot_serve_is_named(tmp_path, wrong, message):
    root = write_photos(tmp_path, [entry(0), wrong, *[entry(n) for n in range(2, 20)]])
    with pytest.raises(SettingError, match=message):
        prepared(root)


@pytest.mark.parametrize("content", ["{", "{}", "[]"])
def test_a_file_of_another_form_is_refused(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(SettingError, match=r"is not JSON|holds no list of entries"):
        read_entries(tmp_path / "a.json")
    with pytest.raises(SettingError, match="is not a file"):
        read_entries(tmp_path / "b.json")


def test_a_mark_of_windows_before_the_json_is_read_over(tmp_path):
    write_photos(tmp_path)
    file = tmp_path / "captions.json"
    file.write_text(file.read_text(), encoding="utf-8-sig")
    assert len(prepared(tmp_path).train_set) == 12


def test_without_a_list_of_captions_all_of_them_are_refused(tmp_path):
    root = write_photos(tmp_path, [entry(n, captions=None) for n in range(20)])
    assert len(prepared(root).train_set) == 12
    with pytest.raises(SettingError, match=r"entry 0 \('p0'\) has no list of captions"):
        prepared(root, all_captions=True)


def test_a_long_caption_is_refused_or_cut_and_the_cut_ones_are_counted(tmp_path, caplog):
    root = write_photos(tmp_path)
    with pytest.raises(
        SettingError, match=r"captions.json, entry \d+ .*has \d+ tokens.*room for 8\. Write max_tokens: 8"
    ):
        prepared(root, reader=ByWord(8))
    with pytest.raises(SettingError, match=r"data.max_tokens = 9: the language model has room for 8"):
        prepared(root, reader=ByWord(8), max_tokens=9)
    with caplog.at_level("INFO"):
        data = prepared(root, reader=ByWord(8), max_tokens=7)
    longer = sum(2 + n % 9 > 7 for n in range(20))
    assert f"{longer} of 20 captions have more than 7 tokens and are cut" in caplog.text
    assert data.tokens.lengths.max() == 7


def test_questions_stand_before_captions_where_the_task_reads_them(tmp_path):
    data = prepared(write_photos(tmp_path), reader=ByWord(10, reads_instructions=True), max_tokens=3)
    _, captions = next(iter(data.train_dataloader()))
    assert set(captions.given) == {3}
    assert captions.values[:, :3].tolist() == [[4, 2, 3]] * 6
    assert captions.lengths.max() == 6
    with pytest.raises(SettingError, match=r"max_tokens = 8: .*room for 7"):
        prepared(tmp_path, reader=ByWord(10, reads_instructions=True), max_tokens=8)
    silent = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A dog."}]
    root = write_photos(tmp_path, [entry(n, conversations=silent) for n in range(20)])
    with pytest.raises(SettingError, match="wants questions, and the captions have none"):
        prepared(root, reader=ByWord(reads_instructions=True))


def test_a_long_question_takes_room_from_its_own_caption_alone(tmp_path):
    """Captions have 2 to 10 words, the question of entry 3 has 8 and the others' 3."""
    asked = "<image> what is it that you see here"
    said = [{"from": "human", "value": f"{asked} dear"}, {"from": "gpt", "value": "a dog"}]
    root = write_photos(tmp_path, [entry(n, conversations=said) if n == 3 else entry(n) for n in range(20)])
    assert prepared(root, reader=ByWord(13, reads_instructions=True)).tokens.lengths.max() == 13
    with pytest.raises(SettingError, match=r"entry 8 .*has 10 tokens.* room for 9\. Write max_tokens: 4,"):
        prepared(root, reader=ByWord(12, reads_instructions=True))
    with pytest.raises(SettingError, match=r"entry 3 .*has 2 tokens.* room for 1\. Write max_tokens: 1,"):
        prepared(root, reader=ByWord(9, reads_instructions=True), max_tokens=4)
    with pytest.raises(SettingError, match=r"entry 3 .*its question leaves no room for a caption"):
        prepared(root, reader=ByWord(8, reads_instructions=True), max_tokens=4)


def test_a_caption_without_a_token_is_refused(tmp_path):
    class Nothing(ByWord):
        def caption_ids(self, captions):
            return [ids[2:] for ids in super().caption_ids(captions)]

    with pytest.raises(SettingError, match=r"entry 0 .*its caption is empty: it has no token"):
        prepared(
            write_photos(tmp_path, [entry(0) for _ in range(2)], photos=20),
            reader=Nothing(),
            val_share=0.0,
            test_share=0.0,
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "a {}"}, "template.*has no effect: the captions are in a file"),
        ({"captions": None, "template": "a {} {}"}, r"must have \{\} once"),
        ({"captions": None, "all_captions": True}, "has no effect: each class has one caption"),
        ({"cache": "rebuild"}, "has no effect without cache_dir"),
        ({"max_tokens": -1}, "max_tokens"),
    ],
)
def test_settings_that_do_not_work_are_refused(tmp_path, settings, message):
    root = write_photos(tmp_path)
    with pytest.raises(SettingError, match=message):
        CaptionDataModule(**{"root": str(root), "captions": str(root / "captions.json"), **settings})


def test_no_tokens_no_setup(tmp_path):
    data = module(write_photos(tmp_path))
    data.tokenizer = None
    with pytest.raises(SettingError, match="cannot tokenise captions"):
        data.setup("fit")


def test_features_take_the_place_of_the_photos_each_read_once(tmp_path):
    data = prepared(write_photos(tmp_path), all_captions=True)
    read: list[int] = []

    def encode(images: Tensor) -> Tensor:
        read.append(len(images))
        return brightness(images)

    plain = data.train_set[5][0]
    data.keep_features("fit", encode, encoder="brightness", feature="pooled")
    assert sum(read) == 12 + 4
    assert torch.equal(data.train_set[5][0], brightness(plain[None])[0])
    assert next(iter(data.train_dataloader()))[0].shape == (6, 1)


def test_a_damaged_photo_is_named_with_its_entry_before_training(tmp_path):
    root = write_photos(tmp_path)
    data = prepared(root)
    broken = Path(data.train_set.photos.files[7])
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(
        DamagedImageError, match=rf"captions.json, entry \d+ \('{broken.stem}'\): .*{broken.name} cannot"
    ):
        data.keep_features("fit", brightness, encoder="brightness", feature="pooled")
    with pytest.raises(DamagedImageError, match=rf"entry \d+ \('{broken.stem}'\)"):
        prepared(root)


def kept(
    root: Path, encode: Any = brightness, encoder: str = "brightness", feature: str = "pooled", **settings: Any
) -> CaptionDataModule:
    data = prepared(root, cache_dir=str(root / "cache"), **settings)
    data.keep_features("fit", encode, encoder=encoder, feature=feature)
    return data


def never(images: Tensor) -> Tensor:
    raise AssertionError


def test_a_cache_is_read_by_later_runs_and_refused_when_it_is_stale(tmp_path):
    root = write_photos(tmp_path)
    first = kept(root).train_set.features
    assert torch.equal(kept(root, never).train_set.features, first)
    assert torch.equal(kept(root, None, encoder="").train_set.features, first)
    with pytest.raises(SettingError, match=r"encoder 'brightness', and here 'other'\. Write cache: rebuild"):
        kept(root, never, encoder="other")
    with pytest.raises(SettingError, match=r"transform 'resize 8, .*', and here 'resize 4"):
        kept(root, never, image_size=4)
    with pytest.raises(SettingError, match="feature 'pooled', and here 'patches'"):
        kept(root, None, feature="patches")
    with pytest.raises(SettingError, match=r"files '\w+', and here"):
        kept(root, never, split_seed=1)
    halved = kept(root, lambda images: brightness(images) / 2, encoder="half", cache="rebuild").train_set.features
    assert torch.equal(halved, first / 2)
    assert torch.equal(kept(root, never, encoder="half", cache="rebuild").train_set.features, halved)
    with pytest.raises(SettingError, match="is missing, and there is no encoder"):
        prepared(root, cache_dir=str(root / "none")).keep_features("fit", None, encoder="", feature="pooled")


def test_the_real_photos_open(shared_data):
    folder = shared_data("data/captions")
    data = CaptionDataModule(
        root=str(folder / "images"), captions=str(folder / "lcs_format.json"), all_captions=True, val_share=0.2,
        test_share=0.0, normalization="clip", image_size=32,
    )  # fmt: skip
    data.tokenizer = ByWord()
    data.setup("fit")
    assert [len(getattr(data, f"{part}_set")) for part in ("train", "val")] == [5 * 240, 5 * 60]
