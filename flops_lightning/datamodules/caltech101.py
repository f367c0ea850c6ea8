"""Caltech101 from torchvision's folder layout."""

from __future__ import annotations

from flops_lightning.datamodules.unsplit import UnsplitDataModule

NAMES = (
    "Faces", "Faces_easy", "Leopards", "Motorbikes", "accordion", "airplanes", "anchor", "ant", "barrel", "bass",
    "beaver", "binocular", "bonsai", "brain", "brontosaurus", "buddha", "butterfly", "camera", "cannon", "car_side",
    "ceiling_fan", "cellphone", "chair", "chandelier", "cougar_body", "cougar_face", "crab", "crayfish",
    "crocodile", "crocodile_head", "cup", "dalmatian", "dollar_bill", "dolphin", "dragonfly", "electric_guitar",
    "elephant", "emu", "euphonium", "ewer", "ferry", "flamingo", "flamingo_head", "garfield", "gerenuk",
    "gramophone", "grand_piano", "hawksbill", "headphone", "hedgehog", "helicopter", "ibis", "inline_skate",
    "joshua_tree", "kangaroo", "ketch", "lamp", "laptop", "llama", "lobster", "lotus", "mandolin", "mayfly",
    "menorah", "metronome", "minaret", "nautilus", "octopus", "okapi", "pagoda", "panda", "pigeon", "pizza",
    "platypus", "pyramid", "revolver", "rhino", "rooster", "saxophone", "schooner", "scissors", "scorpion",
    "sea_horse", "snoopy", "soccer_ball", "stapler", "starfish", "stegosaurus", "stop_sign", "strawberry",
    "sunflower", "tick", "trilobite", "umbrella", "watch", "water_lilly", "wheelchair", "wild_cat", "windsor_chair",
    "wrench", "yin_yang",
)  # fmt: skip


class Caltech101DataModule(UnsplitDataModule):
    """Caltech101: 8,677 photos of objects in 101 classes, 31 to 800 of each.

    Read from ``root/caltech101/101_ObjectCategories/<class>/*``, which torchvision opens and, with ``download``,
    fetches (130 MB). The paper counts 9,144 images "across 101 categories": that is with the 467 of
    ``BACKGROUND_Google``, which is no category of objects. Here, as in torchvision and in every published split, they
    are left out.

    There is no standard split. Unless ``split_file`` names one, half of each class's images train, a fifth validate and
    three tenths test (:mod:`fixed_splits`): the shares of CoOp's split, on which later work on adapting pretrained
    networks reports. CoOp's own file, ``split_zhou_Caltech101.json``, works as well; it has 100 classes, without
    ``Faces_easy``.

    Source: L. Fei-Fei et al., Learning Generative Visual Models from Few Training Examples, 2004.
    """

    data_set = "Caltech101"
    published_classes = 101
    images_below = "caltech101/101_ObjectCategories"
    known_class_names = NAMES
    left_out = ("BACKGROUND_Google",)

    def fetch(self) -> None:
        """Download through torchvision."""
        from torchvision.datasets import Caltech101

        Caltech101(self.root, download=True)
