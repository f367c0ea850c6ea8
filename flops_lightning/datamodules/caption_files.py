"""Captioned photos: the JSON of LLaVA, whose entries are ``{"id", "image", "conversations"}``; no Lightning here."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from flops_lightning.datamodules.files import Listing, Part, file_sizes
from flops_lightning.datamodules.image_folder import ImageFolderSource
from flops_lightning.datamodules.text_files import HALF, is_whole
from flops_lightning.errors import DamagedImageError, SettingError

IMAGE = "<image>"
"""Stands for the photo in a question."""
FORM = 'Write [{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", "value": "A dog."}].'


@dataclass(frozen=True)
class Entry:
    """A photo with a caption or several.

    Attributes:
        name: By what messages call it, as ``entry 17 ('00453/004539375')``.
        image: Path below the folder of the photos.
        captions: What is said of it.
        instruction: The question without the photo's place in it.
    """

    name: str
    image: str
    captions: tuple[str, ...]
    instruction: str


def read_entries(file: str | Path, *, all_captions: bool = False) -> list[Entry]:
    """Read a JSON file of LLaVA's form, as that of LCS-558K: one question with ``<image>`` and its answer an entry.

    Args:
        file: The file.
        all_captions: Take the list ``captions`` of each entry in the place of the answer.

    Raises:
        SettingError: it is not such a file; an entry has no photo, no ``<image>`` or an empty caption.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise SettingError("data.captions", str(file), "is not a file.", "Give a JSON file of LLaVA's form.")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))  # Windows puts a mark in front
    except ValueError as error:
        problem = f"is not JSON ({error})."
        raise SettingError("data.captions", str(file), problem, "Give an undamaged file.") from error
    if not isinstance(content, list) or not content:
        raise SettingError("data.captions", str(file), "holds no list of entries.", "Give a file of LLaVA's form.")
    return [_read(entry, place, str(file), all_captions) for place, entry in enumerate(content)]


def _read(entry: Any, place: int, file: str, all_captions: bool) -> Entry:
    name = f"entry {place}" + (f" ({entry['id']!r})" if isinstance(entry, dict) and "id" in entry else "")

    def refusal(problem: str, remedy: str) -> SettingError:
        return SettingError("data.captions", file, f"{name} {problem}", remedy)

    if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
        raise refusal("has no image.", "Write its path below data.root, or leave the entry out.")
    turns = entry.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise refusal("has no conversations.", FORM)
    said = [(turn.get("from"), turn.get("value")) for turn in turns]
    if [speaker for speaker, _ in said] != ["human", "gpt"] or not all(isinstance(value, str) for _, value in said):
        raise refusal(f"has {len(said)} turns, and a caption is one question with its answer.", FORM)
    question, answer = (str(value) for _, value in said)
    if question.count(IMAGE) != 1:
        raise refusal(f"has {question.count(IMAGE)} times {IMAGE} in its question.", f"Write it once. {FORM}")
    captions = entry.get("captions") if all_captions else [answer]
    if not isinstance(captions, list) or not captions or not all(isinstance(text, str) for text in captions):
        raise refusal("has no list of captions.", "Write one, or all_captions: false for the answers alone.")
    if not all(text.strip() for text in captions):
        raise refusal("has an empty caption.", "Write one, or leave the entry out.")
    if not all(map(is_whole, (question, *captions))):
        raise refusal(f"{HALF}.", "Write it whole, or leave it out.")
    stripped = tuple(text.strip() for text in captions)
    return Entry(name, entry["image"], stripped, question.replace(IMAGE, "").strip())


@dataclass(frozen=True)
class CaptionSource(ImageFolderSource):
    """Photos below a folder, listed with their captions in a file; a listing has each photo once.

    Attributes:
        captions: The file.
        all_captions: See :func:`read_entries`.
    """

    captions: str = ""
    all_captions: bool = False

    @cached_property
    def entries(self) -> list[Entry]:
        """The file's entries, read when they are first asked for."""
        return read_entries(self.captions, all_captions=self.all_captions)

    def by_photo(self, root: str) -> dict[str, list[Entry]]:
        """The entries of each photo, by its path, in the order of the file.

        Raises:
            SettingError: a photo lies outside of the folder; its entry is named.
        """
        found: dict[str, list[Entry]] = {}
        top = str(Path(root).expanduser())
        for entry in self.entries:  # no Path for each: of a million they would take a minute
            # One path for a photo however it is written: under two, one could be learned from and the other held out.
            place = os.path.normpath(entry.image)
            if os.path.isabs(place):  # noqa: PTH117
                place = os.path.relpath(place, top)
            if place.split(os.sep, 1)[0] == os.pardir:
                problem = f"{entry.name}: {entry.image} is outside of {root}."
                raise SettingError("data.captions", self.captions, problem, "Give a folder above all photos as root.")
            found.setdefault(f"{top}{os.sep}{place}", []).append(entry)
        return found

    def remedy(self, root: str) -> str:
        """What to put where."""
        return f"Put the photos that {self.captions} lists into {root}."

    def parts(self, root: str) -> list[Part]:
        """None: the photos are split by shares."""
        return []

    def find_class_names(self, root: str) -> tuple[str, ...]:
        """One, of all photos: they are split alike."""
        return ("photo",)

    def listings(self, root: str, class_names: tuple[str, ...], *, all_classes: bool) -> Mapping[Part, Listing]:
        """Every photo once, with label 0.

        Raises:
            SettingError: one is missing or empty; the entry and the path are named.
        """
        photos = self.by_photo(root)
        for (path, entries), size in zip(photos.items(), file_sizes(list(photos)), strict=True):
            if not size:
                problem = f"{entries[0].name}: {path} is {'missing' if size is None else 'empty'}."
                raise SettingError("data.captions", self.captions, problem, self.remedy(root))
        return {"train": Listing.of([(path, 0) for path in photos])}

    def naming(self, error: DamagedImageError, root: str) -> DamagedImageError:
        """The same error with the entry of its photo."""
        found = next((e[0].name for path, e in self.by_photo(root).items() if str(error).startswith(f"{path} ")), "")
        return DamagedImageError(f"{self.captions}, {found}: {error}" if found else str(error))


def caption_lengths(lengths: Sequence[int], most: int, rooms: Sequence[int], names: Sequence[str]) -> int:
    """How many captions ``most`` tokens cut short; ``names`` are by what a message calls each caption.

    Args:
        lengths: Tokens of each caption.
        most: The longest that is kept, longer ones are cut; 0: none is.
        rooms: Tokens of each that the language model has room for behind its question; empty: it is not known.
        names: File and entry of each.

    Raises:
        SettingError: a caption has no token or, as it is or cut, more than there is room for; ``most`` is above all
            rooms.
    """
    if rooms and most > max(rooms) >= 1:
        problem = f"the language model has room for {max(rooms)} tokens of a caption."
        raise SettingError("data.max_tokens", most, problem, f"Write {max(rooms)} or less.")
    for length, room, name in zip(lengths, rooms or lengths, names, strict=True):
        if length == 0:
            remedy = "Leave the entry out."
            raise SettingError("data.captions", name, "its caption is empty: it has no token.", remedy)
        if min(length, most or length) <= room:
            continue
        if room < 1:
            problem = "its question leaves no room for a caption in the language model."
            raise SettingError("data.captions", name, problem, "Shorten the question, or leave the entry out.")
        problem = f"its caption has {length} tokens, and the language model has room for {room}."
        least = min(each for each in rooms if each >= 1)
        raise SettingError("data.captions", name, problem, f"Write max_tokens: {least}, which cuts it short.")
    return sum(length > most for length in lengths) if most else 0
