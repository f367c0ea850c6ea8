"""``python -m experiments.config_table``: the README's table of configurations, made from their headers.

The first sentence of the comment that a file opens with describes it. The cells of the paper's Table 1 are a grid.
``--check`` writes nothing, and exits with code 1 if the README says anything else.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.table1_paper import DATA_SETS, PAPER
from flops_lightning.errors import SettingError

COMMAND = "python -m experiments.config_table"
START, END = f"<!-- configs: made by {COMMAND} -->\n", "<!-- end of configs -->"


def description(path: Path) -> str:
    """First sentence of a file's header, without its full stop.

    Raises:
        SettingError: the file opens with no sentence in a comment.
    """
    # Lines of further indentation are notes, such as `#   launch:  ...`.
    header = re.match(r"(?:# \S.*\n)*", path.read_text())
    text = " ".join(line.removeprefix("# ") for line in header[0].splitlines()) if header else ""
    sentence = re.match(r"(.+?)\.(?= |$)", text)
    if sentence is None:
        raise SettingError(
            "configs", path.as_posix(), "does not open with a comment that says what it is.",
            "Begin it with `# ` and a sentence that ends in a full stop.",
        )  # fmt: skip
    return sentence[1]


def link(root: Path, path: Path) -> str:
    """Markdown that leads from the README to a file."""
    name = path.relative_to(root).as_posix()
    return f"[{name.removeprefix('configs/').removesuffix('.yaml')}]({name})"


def tables(root: Path) -> str:
    """Markdown: the grid of the paper's cells, then a row for every other file, those without a folder first.

    Args:
        root: Folder of the repository.
    """
    files = sorted((root / "configs").rglob("*.yaml"), key=lambda path: (len(path.parts), path))
    lines = ["| Table 1 (paper's OPS-LR, %) | " + " | ".join(PAPER) + " |", "|---|" + "---|" * len(PAPER)]
    for data_set, *figures in zip(DATA_SETS, *(rows["ops_lr"] for rows in PAPER.values()), strict=True):
        cells = [root / "configs" / f"{model}_{data_set}.yaml" for model in PAPER]
        row = [f"{link(root, path)} {figure:.1f}" for path, figure in zip(cells, figures, strict=True)]
        lines.append(f"| {data_set} | " + " | ".join(row) + " |")
        files = [path for path in files if path not in cells]
    lines += ["", "| file | what it is |", "|---|---|"]
    lines += [f"| {link(root, path)} | {description(path)} |" for path in files]
    return "\n".join(lines) + "\n"


def renewed(readme: str, root: Path) -> str:
    """The README's text with the tables of today between its two markers.

    Raises:
        SettingError: the markers are not there, once each and in order; a file has no header.
    """
    before, _, rest = readme.partition(START)
    _, _, after = rest.partition(END)
    if (readme.count(START), readme.count(END), rest.count(END)) != (1, 1, 1):
        raise SettingError(
            "README.md", None, "does not have the two markers of the table once each.",
            f"Write {START.strip()} and {END} on lines of their own.",
        )  # fmt: skip
    return f"{before}{START}\n{tables(root)}\n{END}{after}"


def main(args: Sequence[str] | None = None) -> None:
    """Rewrite the table in ``README.md``.

    Raises:
        SystemExit: with code 1 if ``--check`` finds another table, 2 after a mistake in README or configurations.
    """
    parser = argparse.ArgumentParser(prog=COMMAND, description="The README's table of configurations.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the table is out of date")
    options = parser.parse_args(args)
    readme = Path("README.md")
    try:
        if not readme.is_file():
            raise SettingError("README.md", None, "is not here.", "Run from the repository's root.")
        old = readme.read_text()
        new = renewed(old, Path())
    except SettingError as error:
        parser.error(str(error))
    if options.check and new != old:
        sys.exit(f"README.md is not what {COMMAND} writes: run it.")
    if new != old:
        readme.write_text(new)


if __name__ == "__main__":
    main()
