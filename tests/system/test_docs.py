"""README and docs: short enough, no dead link, no command, target or flag that does not exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / n for n in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
BANNED = ("goes on from", "gone on", "anew", "whole checkpoint", "whole weights", "told apart")
# Flags of other programs, and the removed ones that the changelog names.
FOREIGN = {"--gpus", "--shm-size", "--ipc", "--no-python", "--nproc-per-node", "--num_accelerators"}
FOREIGN.add("--user")  # docker
FOREIGN |= {
    "--nv",
    "--bind",
    "--pwd",
    "--container-image",
    "--container-mounts",
}  # apptainer, pyxis
FOREIGN.add("--prefix")  # git archive
GONE = {"--hide", "--ratios"}


def source():
    files = [ROOT / "launch.sh", *(ROOT / "eval").rglob("*.py"), *(ROOT / "pipeline").rglob("*.py")]
    files += [*(ROOT / "shard_tools").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    files += (ROOT / "tests/system").glob("*.sh")
    return "\n".join(f.read_text() for f in files if f != Path(__file__).resolve())


SOURCE = source()


def test_the_readme_takes_a_minute():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def test_the_readme_has_the_miniatures_results():
    """Mean ± deviation of finetuning, to one decimal, as docs/mini_paper.md has them."""
    mini, readme = ((ROOT / n).read_text() for n in ("docs/mini_paper.md", "README.md"))
    rows = {"MAE": "`mae`", "R-MAE": "`rmae`", "C-MAE": "`cmae`",
            "random, 100 epochs": "*random initialisation*"}  # fmt: skip
    for name, shown in rows.items():
        cells = re.search(rf"^\| {name} \|.*$", mini, re.MULTILINE)[0].split(" | ")
        theirs = [float(number) for number in cells[4].split(" ± ")]
        line = re.search(rf"^\| {re.escape(shown)} \|.*$", readme, re.MULTILINE)[0]
        ours = re.search(r"([\d.]+) ± ([\d.]+) % \|$", line)
        for a, b in zip(ours.groups(), theirs, strict=True):
            assert abs(float(a) - b) < 0.0501, line


@each_page
def test_relative_links_resolve(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            heads = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in heads}
            assert anchor in slugs, f"{page.name}: {link}"


@each_page
def test_named_files_exist(page):
    roots = r"(?:pipeline|eval|shard_tools|ds_configs|docs|tests)"
    names = re.findall(rf"(?<![\w/.-]){roots}/[\w/]+\.(?:py|yaml|json|sh|md)", page.read_text())
    if page.name == "CHANGELOG.md":  # names former ones
        return
    added = re.findall(r"^```\w+ file=(\S+)$", page.read_text(), re.MULTILINE)
    assert not [n for n in names if not (ROOT / n).exists() and n not in added]


def test_every_room_is_on_the_map():
    """The table in CONTRIBUTING.md names each folder of code: in full, or in its parent's row."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| (`.+) \|$", text, re.MULTILINE)
    for package in ("pipeline", "shard_tools", "eval"):
        for folder in {path.parent for path in (ROOT / package).glob("*/*.py")}:
            named = f"`{package}/{folder.name}/", f"`{folder.name}/`"
            shown = [row for row in rows if named[0] in row or (package in row and named[1] in row)]
            assert shown, folder


@pytest.mark.parametrize("room", ["method", "weights"])
def test_a_rooms_own_map_names_every_file(room):
    folder = ROOT / "pipeline" / room
    text = (folder / "__init__.py").read_text()
    files = {p.stem for p in folder.glob("*.py")} - {"__init__"}
    assert not [name for name in files if not re.search(rf"^    .*\b{name}\b", text, re.MULTILINE)]


@each_page
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(r"(?:`|^    )make (?:-s )?([a-z][a-z-]*)", page.read_text(), re.MULTILINE)
    assert set(named) <= targets


@each_page
def test_flags_exist(page):
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*\w", page.read_text()))
    unknown = named - FOREIGN - (GONE if page.name == "CHANGELOG.md" else set())
    pattern = r"(?<![\w-]){}(?![\w-])"
    assert not [f for f in unknown if not re.search(pattern.format(f), SOURCE)]


@each_page
def test_english(page):
    text = " ".join(page.read_text().lower().split())
    assert not [word for word in BANNED if re.search(rf"\b{word}\b", text)]


def test_every_key_of_data_and_monitor_is_named():
    """In a document or a bundled recipe; a newcomer finds the others by their section's name."""
    from pipeline.config.schema import DataRecipe, MonitorRecipe

    texts = [*PAGES, *(ROOT / "pipeline/recipes").glob("*")]
    text = "\n".join(page.read_text() for page in texts if page.name != "CHANGELOG.md")
    keys = {*DataRecipe.model_fields, *MonitorRecipe.model_fields}
    assert not [key for key in keys if not re.search(rf"\b{key}\b", text)]


def test_the_code_says_it_in_the_words_of_the_field():
    words = (*BANNED, "goes on", "go on from", "made again", "so often", "lies", "in one sentence")
    assert not [word for word in words if re.search(rf"\b{word}\b", SOURCE)]


def test_every_demo_photograph_has_its_origin_and_licence():
    from shard_tools.demo_images import PHOTOGRAPHS

    rows = re.findall(r"^\| (\w+) \| (\w+) `(.+?)` \| .+ \| .+ \|$",
                      (ROOT / "docs/data.md").read_text(), re.MULTILINE)  # fmt: skip
    listed = {name: (package, file) for name, package, file in rows}
    assert listed == {n: (p, f.rsplit("/", 1)[1]) for n, (p, f) in PHOTOGRAPHS.items()}
