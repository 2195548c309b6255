"""The rows of the paper's tables as commands, in pipeline/recipes/README.md.

    python -m eval.paper.recipe_table            rewrite the tables of the README from paper.yaml

The text around them is written by hand; each table is between two comments, `rows of Tab. N` and
`end`.
"""

import argparse
import re
from collections.abc import Sequence
from shlex import quote

from eval.paper.commands import Workspace, base_recipe, class_subset, few_subset
from eval.paper.published import PaperRow, PaperTable, read_paper
from eval.shared.command import run_command
from pipeline.config.recipe import RECIPES
from pipeline.config.schema import IMAGENET_IMAGES
from pipeline.errors import UserError, naming
from shard_tools.atomic import write_atomic

README = RECIPES / "README.md"
SHARDS = "data/shards"
RANDOM = ("--choose", "random")  # subset.py's default
BLOCK = re.compile(r"(<!-- rows of Tab\. (\d) -->\n).*?(<!-- end -->)", re.DOTALL)


def subset_line(source: str, name: str, words: Sequence[str]) -> str:
    """The command that makes a subset of shards, as an indented block of Markdown."""
    words = [
        w for pair in zip(words[::2], words[1::2], strict=True) if pair != RANDOM for w in pair
    ]
    return f"    python shard_tools/subset.py {source} {SHARDS}/{name} {' '.join(words)}"


def row_data(row: PaperRow) -> tuple[str, list[str]]:
    """(shards that a row is pretrained on, commands that make them and, of some classes, val)."""
    source, lines = f"{SHARDS}/train", []
    if row.classes is not None:
        for part in ("val", "train"):
            name, words = class_subset(row.classes, part, Workspace.classes)
            lines.append(subset_line(f"{SHARDS}/{part}", name, words))
        source = f"{SHARDS}/{name}"
    if row.images is not None:
        name, words = few_subset(row, row.images)
        lines.append(subset_line(source, name, words))
        source = f"{SHARDS}/{name}"
    return source, lines


def pretrain_words(row: PaperRow) -> str:
    """`pretrain …`: a row's command behind what every command of the README has in common."""
    data, made = row_data(row)
    words = ["--data", data] if made else []
    words += ["--recipe", f"pipeline/recipes/{base_recipe(row)}.yaml"]
    # An epoch of few images has as many draws.
    sets = [] if row.images is None else [f"data.samples_per_epoch={IMAGENET_IMAGES}"]
    words += [word for text in (*sets, *row.set) for word in ("--set", text)]
    return " ".join(["pretrain", *map(quote, words)])


def pretrained_rows(table: PaperTable) -> list[PaperRow]:
    """The rows that a pretraining of ours makes: not random, supervised or cited ones."""
    return [r for r in table.rows if r.recipe and r.recipe != "supervised" and not r.initial]


def table_text(table: PaperTable) -> str:
    """The text between the comments: the subsets that the table needs, and its rows."""
    rows = pretrained_rows(table)
    lines = list(dict.fromkeys(line for row in rows for line in row_data(row)[1]))
    text = ["", *lines, ""] if lines else [""]
    text += ["| row | command |", "|---|---|"]
    text += [f"| {row.name} | `{pretrain_words(row)}` |" for row in rows]
    return "\n".join([*text, "", ""])


def rewrite(text: str) -> str:
    """The README with its tables generated from the recipes. UserError if comments are missing."""
    tables = {table.number: table for table in read_paper()}
    missing = set(tables) - {int(number) for _, number, _ in BLOCK.findall(text)}
    if missing:
        raise UserError(f"{README}: no comment `rows of Tab. {min(missing)}` … `end`")
    return BLOCK.sub(lambda m: m[1] + table_text(tables[int(m[2])]) + m[3], text)


def main() -> None:
    argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0]).parse_args()
    with naming(README, "cannot be read or written"):
        write_atomic(README, rewrite(README.read_text(encoding="utf-8")))


if __name__ == "__main__":
    run_command(main)
