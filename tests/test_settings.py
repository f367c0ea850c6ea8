"""Settings that an object was made with, those of its base classes included."""

from typing import Any

import pytest

from flops_lightning.settings import KeepsSettings, constructor_parameters


class Base(KeepsSettings):
    def __init__(self, *, width: float = 1.0, kind: str = "plain") -> None:
        self.width, self.kind = width, kind


class Middle(Base):
    def __init__(self, first: int = 3, *, names: tuple[str, ...] = (), **settings: Any) -> None:
        super().__init__(**settings)


class Preset(Middle):
    fixed = frozenset({"kind"})

    def __init__(self, **settings: Any) -> None:
        super().__init__(kind="special", **settings)


class Closed(Base):
    def __init__(self, *, width: float = 2.0) -> None:
        super().__init__(width=width)


def test_settings_of_all_base_classes_are_kept_with_their_defaults():
    assert Middle(4, names=("a", "b"), width=0.5).settings == {
        "first": 4, "names": ["a", "b"], "width": 0.5, "kind": "plain",
    }  # fmt: skip
    assert Closed().settings == {"width": 2.0}


def test_a_fixed_setting_is_neither_kept_nor_accepted_nor_suggested():
    made = Preset(width=3.0)
    assert made.settings == {"first": 3, "names": [], "width": 3.0}
    assert made.kind == "special"
    assert set(constructor_parameters(Preset)) == {"first", "names", "width"}
    with pytest.raises(TypeError, match="kind"):
        Preset(kind="plain")


@pytest.mark.parametrize("cls", [Base, Middle, Preset])
def test_an_unknown_setting_is_refused_by_name(cls):
    with pytest.raises(TypeError, match="widht"):
        cls(widht=1.0)
