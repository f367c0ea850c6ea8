"""Caltech101 from torchvision's folder layout."""

from typing import Any

from flops_lightning.datamodules.class_names import in_words
from flops_lightning.datamodules.photos import PhotoDataModule
from flops_lightning.datamodules.sources import ImageSource

CLASSES = (
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

RENAMED = {"Faces": "face", "Leopards": "leopard", "Motorbikes": "motorbike", "airplanes": "airplane"}
"""CoOp's names of folders that are no words for one thing."""

DEPICTIONS = ("photo", "painting", "sculpture", "sketch", "tattoo", "rendition", "drawing", "doodle")
KINDS = ("plastic", "toy", "embroidered", "cartoon", "plushie", "origami")
"""Of what CLIP's templates for this data set speak, each once with "a" and once with "the"."""


class Caltech101DataModule(PhotoDataModule):
    """Caltech101: 8,677 photos of objects in 101 classes, 31 to 800 of each.

    Read from ``root/caltech101/101_ObjectCategories/<class>/*``, torchvision's layout; ``download`` fetches it
    (130 MB). The paper counts 9,144 images "across 101 categories". This includes the 467 of ``BACKGROUND_Google``,
    which is not a category of objects. Here, as in torchvision and in every published split, they are left out.

    There is no standard split. Unless you give a ``split_file``, 50 % of each class's images are for training, 20 % for
    validation and 30 % for testing: the shares of CoOp's split, which later papers on adapting pretrained networks use.
    CoOp's own file, ``split_zhou_Caltech101.json``, works as well; it has 100 classes, without ``Faces_easy``. Display
    names are CoOp's.

    Source: L. Fei-Fei et al., Learning Generative Visual Models from Few Training Examples, 2004.

    Example:
        >>> data = Caltech101DataModule(download=True, image_size=64)
        >>> data.num_classes, data.class_names[0]
        (101, 'Faces')
        >>> data.display_names[:6]
        ('face', 'Faces easy', 'leopard', 'motorbike', 'accordion', 'airplane')
    """

    class_names = CLASSES
    source = ImageSource("Caltech101", "caltech101/101_ObjectCategories", CLASSES, left_out=("BACKGROUND_Google",))

    def __init__(self, **settings: Any) -> None:
        """Check the settings (:class:`PhotoDataModule`) and that the folder is there."""
        super().__init__(val_images=0, test_images=0, **settings)

    @property
    def display_names(self) -> tuple[str, ...]:
        """See :attr:`ImageDataModule.display_names`."""
        return in_words([RENAMED.get(name, name) for name in self.class_names])

    @property
    def templates(self) -> tuple[str, ...]:
        """CLIP's 34 for this data set."""
        return tuple(
            template
            for article in ("a", "the")
            for template in (
                *(f"a {depiction} of {article} {{}}." for depiction in DEPICTIONS),
                *(f"{art} of {article} {{}}." for art in ("art", "graffiti")),
                *(f"{article} {kind} {{}}." for kind in KINDS),
                f"{article} {{}} in a video game.",
            )
        )
