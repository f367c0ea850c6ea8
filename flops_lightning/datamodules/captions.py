"""Photos with captions, for language models that learn to see."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader

from flops_lightning.datamodules.caption_batches import CaptionSet, CaptionTokens, ReadsCaptions, shortest_first
from flops_lightning.datamodules.caption_files import CaptionSource, caption_lengths
from flops_lightning.datamodules.feature_cache import (
    FeatureKey,
    cached_features,
    gathered,
    hash_of_files,
    read_features,
)
from flops_lightning.datamodules.files import Listing, Part, file_sizes
from flops_lightning.datamodules.image_folder import ImageFolderDataModule
from flops_lightning.datamodules.loading import WHOLE
from flops_lightning.errors import DamagedImageError, SettingError, check_choice, check_flag, check_path, check_whole

PARTS_OF: dict[str, tuple[Part, ...]] = {
    "fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test",),
}  # fmt: skip
"""The parts whose images a stage reads."""


class CaptionDataModule(ImageFolderDataModule):
    """Photos with captions, from a JSON file in LLaVA's format or from class folders with one caption per class.

    A batch is ``(images (b, 3, image_size, image_size) float32, captions)``, where ``captions`` are
    :class:`~flops_lightning.suffix_loss.PaddedTargets` of tokens. Training batches are sorted by caption length. The
    task tokenises the captions (:class:`ReadsCaptions`) and replaces the images by features (:meth:`keep_features`), so
    that every photo is read once, before training. Photos are split, not captions: all captions of a photo are in the
    same part.

    Attributes:
        tokenizer: Tokenises captions if no task does.
        texts: All captions, by number.
        instructions: The question that each answers; empty for class folders.

    Args:
        root: Folder of the photos, or of class folders as :class:`ImageFolderDataModule` reads them.
        captions: JSON file with an entry ``{"id", "image", "conversations"}`` for each photo, as LCS-558K; None: the
            photos are in class folders.
        template: Caption of a class, with ``{}`` for its name; None: ``a photo of a {}.``
        all_captions: Use the list ``captions`` of an entry instead of the answer in its conversation.
        max_tokens: Cut longer captions, and log how many; 0: a caption longer than the language model's context is an
            error.
        cache_dir: Folder for features, one file per part, for later runs; None: they are kept in memory.
        cache: ``use`` existing features, and refuse those of another encoder, transform or list of files; or
            ``rebuild`` these.
        batch_size: Captions per batch.
        image_size: See :class:`ImageFolderDataModule`, as for all below.
        images_per_class: Number of training photos, per class if there are classes.
        val_share: Share of the photos for validation.
        test_share: Share of the photos for testing.
        split_seed: Seed of the split.
        normalization: Mean and standard deviation of the pixels.
        num_workers: Number of worker processes of the data loaders.

    Raises:
        SettingError: as for :class:`ImageFolderDataModule`; a file is not as above (the error names its entry), or a
            setting has no effect.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as root:
        ...     for name in ("ship", "truck"):
        ...         (Path(root) / name).mkdir()
        ...     data = CaptionDataModule(root=root, template="a {} .")
        >>> data.class_captions
        ('a ship .', 'a truck .')
    """

    tokenizer: ReadsCaptions | None = None

    def __init__(
        self, *, root: str, captions: str | None = None, template: str | None = None, all_captions: bool = False,
        max_tokens: int = 0, cache_dir: str | None = None, cache: Literal["use", "rebuild"] = "use",
        batch_size: int = 64, image_size: int = 0, images_per_class: int = 0,
        val_share: float | None = None, test_share: float | None = None, split_seed: int = 0,
        normalization: Literal["backbone", "imagenet", "inception", "clip"] = "backbone", num_workers: int = 0,
    ) -> None:  # fmt: skip
        """Check the settings; photos and captions are checked by :meth:`check`."""
        check_flag("data.all_captions", all_captions)
        check_whole("data.max_tokens", max_tokens, 0, "Write a number of tokens, or 0.")
        check_choice("data.cache", cache, ("use", "rebuild"))
        if captions is not None:
            check_path("data.captions", captions, "Give a JSON file of LLaVA's form.")
            self.source = CaptionSource("captioned photos", captions=str(captions), all_captions=all_captions)
        elif all_captions:
            problem = "has no effect: each class has one caption."
            raise SettingError("data.all_captions", True, problem, "Leave it out, or give a file of captions.")
        if template is not None and (captions is not None or template.count("{}") != 1):
            problem = "must have {} once." if captions is None else "has no effect: the captions are in a file."
            raise SettingError("data.template", template, problem, 'Write "a {} .", say, or leave it out.')
        if cache_dir is None and cache == "rebuild":
            raise SettingError("data.cache", cache, "has no effect without cache_dir.", "Give a folder for features.")
        super().__init__(
            root=root, batch_size=batch_size, image_size=image_size, images_per_class=images_per_class,
            val_share=val_share, test_share=test_share,
            split_seed=split_seed, normalization=normalization, num_workers=num_workers,
        )  # fmt: skip
        self.captions, self.all_captions, self.max_tokens = captions, all_captions, max_tokens
        self.cache_dir, self.cache = cache_dir, cache
        if template is not None:
            self.template = template
        self.texts: list[str] = []
        self.instructions: list[str] = []
        self.tokens = CaptionTokens([])

    @property
    def class_captions(self) -> tuple[str, ...]:
        """Captions of the classes, in the order of the labels; empty with a file of captions."""
        return (
            () if self.captions is not None else tuple(self.template.replace("{}", name) for name in self.display_names)
        )

    def check(self) -> Mapping[Part, Listing]:
        """See :class:`PhotoDataModule`; a damaged photo is named with its entry."""
        with self._naming_entries():
            return super().check()

    def setup(self, stage: str) -> None:
        """Split the photos, give each its captions, and make tokens of these."""
        super().setup(stage)
        parts, names = self.check(), list[str]()
        entries = self.source.by_photo(self.root) if isinstance(self.source, CaptionSource) else {}
        self.texts, self.instructions = list(self.class_captions), [""] * len(self.class_captions)
        for part, listing in parts.items():
            places, numbers = list(range(len(listing.files))), list(listing.labels)
            if entries:
                places, numbers = [], []
                for place, file in enumerate(listing.files):
                    for entry in entries[file]:
                        places += [place] * len(entry.captions)
                        numbers += range(len(self.texts), len(self.texts) + len(entry.captions))
                        self.texts += entry.captions
                        self.instructions += [entry.instruction] * len(entry.captions)
                        names += [f"{self.captions}, {entry.name}"] * len(entry.captions)
            setattr(self, f"{part}_set", CaptionSet(getattr(self, f"{part}_set"), places, numbers))
        self.tokens = self._tokens(names or list(self.class_captions))

    def _tokens(self, names: Sequence[str]) -> CaptionTokens:
        reader: Any = self.tokenizer or getattr(self.trainer, "lightning_module", None)
        if not hasattr(reader, "caption_ids"):
            problem = "cannot tokenise captions."
            remedy = "Train an AdapterAlignment, or set the data module's tokenizer."
            raise SettingError("data", type(reader).__name__, problem, remedy)
        ids, most = reader.caption_ids(self.texts), self.max_tokens
        questions: Sequence[Sequence[int]] = [()] * len(ids)
        if reader.reads_instructions:
            if not any(self.instructions):
                problem = "wants questions, and the captions have none."
                raise SettingError("prompt", "instruction", problem, "Write prompt: plain.")
            questions = reader.caption_ids(self.instructions)
        context = reader.caption_context
        rooms = [context - len(question) for question in questions] if context else []
        cut = caption_lengths([len(each) for each in ids], most, rooms, names)
        if cut:
            rank_zero_info(
                f"data.max_tokens: {cut:,} of {len(ids):,} captions have more than {most} tokens and are cut"
            )
        whole = [[*question, *(each[:most] if most else each)] for question, each in zip(questions, ids, strict=True)]
        return CaptionTokens(whole, [len(each) for each in questions] if reader.reads_instructions else None)

    def keep_features(
        self, stage: str, encode: Callable[[Tensor], Tensor] | None, *, encoder: str, feature: str
    ) -> str:
        """Put features in the place of the photos that a stage reads; each photo is read once.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``.
            encode: ``(b, 3, h, w)`` images to ``(b, ...)`` features; None: they must be in ``cache_dir``.
            encoder: Name and hash of what encodes; empty with ``encode`` None.
            feature: Which of its outputs the features are.

        Returns:
            Name and hash of what encoded them; empty where the stage reads none.

        Raises:
            SettingError: the cache is of another encoder, feature, transform or list of files, or is not there.
            DamagedImageError: a photo cannot be read; its entry and path are named.
        """
        transform = f"resize {self.image_size}, mean {tuple(self.mean)}, std {tuple(self.std)}"
        top = Path(self.root).expanduser()
        for part in PARTS_OF[stage]:
            captioned: CaptionSet = getattr(self, f"{part}_set")
            files = list(self.check()[part].files)
            if not files:
                continue
            names = [os.path.relpath(file, top) for file in files]
            key = FeatureKey(encoder, feature, transform, hash_of_files(names, file_sizes(files)))
            cache = None if self.cache_dir is None else Path(self.cache_dir).expanduser() / f"{part}.safetensors"
            if encode is None:
                captioned.features, encoder = self._stored(cache, key)
                continue

            def compute(photos: Any = captioned.photos, encode: Callable[[Tensor], Tensor] = encode) -> Tensor:
                loader = DataLoader(photos, batch_size=self.batch_size or WHOLE, num_workers=self.num_workers)
                with self._naming_entries():
                    return gathered((encode(images) for images, _ in loader), len(photos))

            captioned.features = (
                compute() if cache is None else cached_features(cache, key, compute, rebuild=self.cache == "rebuild")
            )
        return encoder

    def _stored(self, cache: Path | None, key: FeatureKey) -> tuple[Tensor, str]:
        if cache is None or not cache.is_file():
            given = None if cache is None else str(cache)
            problem = "is missing, and there is no encoder to compute features."
            raise SettingError("data.cache_dir", given, problem, "Give the folder of an earlier run, or an encoder.")
        found, features = read_features(cache)
        key = FeatureKey(key.encoder or found.encoder, key.feature, found.transform, key.files)
        if found != key:
            problem = f"{cache} has {found.differences(key)}."
            raise SettingError("data.cache", self.cache, problem, "Give an encoder and write cache: rebuild.")
        return features, found.encoder

    @contextmanager
    def _naming_entries(self) -> Iterator[None]:
        try:
            yield
        except DamagedImageError as error:
            if isinstance(self.source, CaptionSource):
                raise self.source.naming(error, self.root) from error
            raise

    @property
    def mixing(self) -> Any:
        """Sorts a training batch."""
        return shortest_first

    def collate(self, samples: list[Any]) -> Any:
        """Images or features of samples, and the tokens of their captions."""
        return self.tokens.batch(samples)
