"""``python -m experiments.config_table``: the tables of configurations in docs/configs.md, made from their headers.

The first sentence of the comment that a file opens with describes it. The cells of the paper's Table 1 are a grid.
``--check`` writes nothing, and exits with code 1 if the page says anything else.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.table1 import DATA_SETS, PAPER
from experiments.tables import markdown
from flops_lightning.errors import SettingError

COMMAND = "python -m experiments.config_table"
PAGE = Path("docs/configs.md")
START, END = f"<!-- configs: made by {COMMAND} -->\n", "<!-- end of configs -->"


def description(path: Path) -> str:
    """First sentence of a file's header, without its full stop; lines of further indentation are notes."""
    header = re.findall(r"\A(?:# \S.*\n)*", path.read_text())[0]
    sentence = re.match(r"(.+?)\.(?= |$)", " ".join(line.removeprefix("# ") for line in header.splitlines()))
    if sentence is None:
        remedy = "Begin it with `# ` and a sentence that ends in a full stop."
        raise SettingError("configs", path.as_posix(), "does not open with a comment that says what it is.", remedy)
    return sentence[1]


def tables(root: Path) -> str:
    """Markdown: the grid of the paper's cells, then a row for every other file, those without a folder first."""
    folder = root / "configs"

    def link(path: Path) -> str:
        name = path.relative_to(folder).as_posix()
        return f"[{name.removesuffix('.yaml')}](../configs/{name})"

    files = sorted(folder.rglob("*.yaml"), key=lambda path: (len(path.parts), path))
    grid = []
    for data_set, *figures in zip(DATA_SETS, *(rows["ops_lr"] for rows in PAPER.values()), strict=True):
        cells = [folder / f"{model}_{data_set}.yaml" for model in PAPER]
        grid.append([data_set, *(f"{link(path)} {figure:.1f}" for path, figure in zip(cells, figures, strict=True))])
        files = [path for path in files if path not in cells]
    others = [[link(path), description(path)] for path in files]
    columns = ["Table 1 (paper's OPS-LR, %)", *PAPER]
    return f"{markdown(columns, grid)}\n{markdown(['file', 'what it is'], others)}"


def renewed(page: str, root: Path) -> str:
    """The page's text with the tables of today between its two markers."""
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    if (page.count(START), page.count(END), rest.count(END)) != (1, 1, 1):
        remedy = f"Write {START.strip()} and {END} on lines of their own."
        raise SettingError(PAGE.as_posix(), None, "does not have each of the two markers once, in order.", remedy)
    return f"{before}{START}\n{tables(root)}\n{END}{after}"


def main(args: Sequence[str] | None = None) -> None:
    """Rewrite the tables in ``docs/configs.md``; exits with code 2 after a mistake there or in a configuration."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=f"The tables of configurations in {PAGE}.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if they are out of date")
    options = parser.parse_args(args)
    try:
        if not PAGE.is_file():
            raise SettingError("folder", str(Path.cwd()), f"has no {PAGE}.", "Run from the repository's root.")
        old = PAGE.read_text()
        new = renewed(old, Path())
    except SettingError as error:
        parser.error(str(error))
    if options.check and new != old:
        sys.exit(f"{PAGE} is not what {COMMAND} writes: run it.")
    PAGE.write_text(new)


if __name__ == "__main__":
    main()
