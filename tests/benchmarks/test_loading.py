"""The photos are like photos, every image of a round is loaded, and the need is a ratio of rates."""

import re
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import loading
from benchmarks.harness import Timings
from flops_lightning.errors import SettingError


def cells(text: str) -> list[list[str]]:
    """Of all lines of tables but the headers."""
    lines = [line for line in text.splitlines() if re.match(r"\| [\d.]", line)]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    loading.write_photos(root, 16)
    return root


def test_the_photos_have_the_size_of_imagenets_in_pixels_and_bytes(photos):
    files = sorted(photos.glob("train/*/*.JPEG"))
    assert Counter(file.parent.name for file in files) == {f"n{i:08}": 2 for i in range(8)}
    for file in files:
        with Image.open(file) as image:
            assert (image.format, image.size, image.mode) == ("JPEG", (500, 375), "RGB")
        assert 90_000 < file.stat().st_size < 130_000


@pytest.mark.parametrize(("images", "loaded"), [(7, 7), (100, 16)])
def test_a_round_loads_each_image_once_and_its_rate_is_images_over_seconds(images, loaded, photos, monkeypatch):
    shapes, seen = [], []

    def read(loader):
        batches = list(loader)
        shapes.append({batch.shape[1:] for batch, _ in batches})
        seen.append(sum(len(batch) for batch, _ in batches))

    def alternate(contenders, *, rounds, clock):
        for _ in range(rounds):
            for contender in contenders.values():
                contender()
        return Timings(dict.fromkeys(contenders, (0.5, 0.25)))

    monkeypatch.setattr(loading, "read", read)
    monkeypatch.setattr(loading, "alternate", alternate)
    found = loading.rates(photos, [0, 1], images=images, image_size=24, augment=True, rounds=2)
    assert seen == [loaded] * 4
    assert shapes == [{(3, 24, 24)}] * 4
    assert found == {0: [2 * loaded, 4 * loaded], 1: [2 * loaded, 4 * loaded]}


def test_the_need_is_what_a_step_takes_over_what_a_worker_gives():
    assert cells(loading.need_table(100.0, 128, [0.5, 5])) == [["0.5", "256", "2.6"], ["5", "26", "0.3"]]
    text = loading.rate_table({2: [150.0, 190.0, 170.0], 1: [100.0, 90.0, 110.0]})
    assert cells(text) == [["1", "100 (90 - 110)", "1.00"], ["2", "170 (150 - 190)", "1.70"]]


def test_the_linked_files_are_as_many_as_asked_for_in_up_to_a_thousand_classes(tmp_path):
    loading.link_files(tmp_path, 2001)
    per_class = Counter(file.parent.name for file in tmp_path.glob("train/*/*"))
    assert Counter(per_class.values()) == {2: 999, 3: 1}


@pytest.mark.slow
def test_the_command_prints_the_need_for_the_step_given_and_the_rate_of_the_check(capsys):
    loading.main(
        ["--images", "4", "--image_size", "16", "--workers", "1", "--rounds", "1", "--step_seconds", "0.1",
         "--batch", "10", "--check_files", "30"]
    )  # fmt: skip
    printed = capsys.readouterr().out
    (workers, rates, _), (step, images, needed) = cells(printed)
    assert (workers, step, images) == ("1", "0.1", "100")
    rate, needed = float(rates.split()[0]), float(needed)
    assert needed == pytest.approx(100 / rate, abs=0.05 + 100 / rate * 0.5 / rate)  # both are rounded
    assert re.search(r"^Check of 30 files: [\d.]+ s, [\d,]+ files/s\.$", printed, re.MULTILINE)


def test_a_folder_without_photos_is_refused(tmp_path):
    with pytest.raises(SettingError, match=r"data\.root"):
        loading.main(["--root", str(tmp_path)])
