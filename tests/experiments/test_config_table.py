"""The tables of docs/configs.md say what the configurations say."""

import re
from pathlib import Path

import pytest

from experiments.config_table import END, START, description, main, renewed, tables
from flops_lightning.errors import SettingError
from tests.experiments.fakes import ROOT, entries

FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml"))


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_the_page_is_up_to_date() -> None:
    main(["--check"])


def test_every_configuration_is_linked_once_and_those_of_the_paper_beside_its_figures() -> None:
    grid, _, rows = tables(ROOT).partition("\n\n")
    assert sorted(re.findall(r"\]\(\.\./(configs/[^)]+)\)", grid + rows)) == FILES
    found = {row[0]: row[1:] for row in entries(grid)}
    assert len(found) == 1 + 7
    assert found["cifar10"][0] == "[vit_base_cifar10](../configs/vit_base_cifar10.yaml) 93.2"
    assert found["eurosat"][1] == "[vit_large_eurosat](../configs/vit_large_eurosat.yaml) 90.1"
    assert "vit_base_" not in rows
    assert {file for file, text in entries(rows) if len(text) > 120} == set()


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("# One GPU.\n#   launch:  x\n", "One GPU"),
        ("# Two words\n# and more (see a.yaml, v1.5). Not this.\nseed: 1\n", "Two words and more (see a.yaml, v1.5)"),
    ],
)
def test_a_description_is_the_first_sentence_of_the_header(tmp_path: Path, header: str, expected: str) -> None:
    assert description(write(tmp_path / "a.yaml", header)) == expected


@pytest.mark.parametrize("text", ["", "# no full stop\n", "#   launch:  python main.py fit.\n", "\n# Late.\n"])
def test_a_file_without_a_header_is_named(tmp_path: Path, text: str) -> None:
    write(tmp_path / "configs" / "bare.yaml", text)
    with pytest.raises(SettingError, match=r"configs/bare\.yaml.*does not open with a comment.*Begin it with"):
        renewed(START + END, tmp_path)


@pytest.mark.parametrize("text", ["", END + START, START + START + END, START + END + END])
def test_without_both_markers_nothing_is_guessed(text: str) -> None:
    with pytest.raises(SettingError, match="two markers"):
        renewed(text, ROOT)


def test_check_finds_an_old_table_and_a_run_at_the_root_renews_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "configs" / "method" / "new.yaml", "# Method overlay: a new one.\n")
    before = f"# Title\n\n{START}| old |\n{END}\nThe rest.\n"
    page = write(tmp_path / "docs" / "configs.md", before)
    with pytest.raises(SystemExit, match="run it") as leaving:
        main(["--check"])
    assert leaving.value.code not in (0, 2)  # a text: Python prints it and exits with 1
    assert page.read_text() == before
    main([])
    text = page.read_text()
    assert text.startswith(f"# Title\n\n{START}")
    assert text.endswith(f"](../configs/method/new.yaml) | Method overlay: a new one |\n\n{END}\nThe rest.\n")
    assert "old" not in text
    main(["--check"])
    monkeypatch.chdir(tmp_path / "docs")
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "Run from the repository's root." in capsys.readouterr().err
