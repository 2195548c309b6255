"""--help of every command: each argument is explained, each default is said once and readably."""

import argparse
import importlib
import re
from pathlib import Path

import pytest
from launching import ROOT

from pipeline.help_text import HelpFormatter

COMMANDS = sorted(
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    for folder in ("eval", "pipeline", "shard_tools")
    for path in (ROOT / folder).glob("*.py")
    if re.search(r"\bparse(_args)?\(", text := path.read_text("utf-8")) and "def main(" in text
)


class Parsed(Exception):
    """The parser that a command would use."""


def parser_of(command: str, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    def stop(self, *arguments, **options):
        raise Parsed(self)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
    module = importlib.import_module(command)
    with pytest.raises(Parsed) as caught:
        module.main()
    parser = caught.value.args[0]
    assert isinstance(parser, argparse.ArgumentParser)
    return parser


def test_the_commands_are_found():
    assert {"eval.embed", "pipeline.pretrain", "shard_tools.make_shards"} < set(COMMANDS)


def test_the_help_names_the_projects_that_the_page_names(monkeypatch):
    page = (ROOT / "docs/evaluation.md").read_text("utf-8")
    projects = re.search(r"- a checkpoint file of (.*?),\n", page)[1]
    parser = parser_of("eval.knn", monkeypatch)
    said = next(a.help for a in parser._actions if a.dest == "encoder")
    for project in re.split(", | or ", projects.replace("facebookresearch/mae", "MAE")):
        assert project in said


@pytest.mark.parametrize("command", COMMANDS)
def test_every_argument_is_explained(command, monkeypatch):
    parser = parser_of(command, monkeypatch)
    assert [a.dest for a in parser._actions if not a.help] == []
    workers = [a.metavar for a in parser._actions if a.dest == "workers"]
    assert workers in ([], ["N"])
    for action in parser._actions:
        alone = argparse.ArgumentParser(
            add_help=False, usage="", formatter_class=parser.formatter_class
        )
        alone._add_action(action)
        text = alone.format_help()
        assert text.count("default: ") <= 1, text
        if isinstance(action.default, Path):
            assert action.default.stem in text, text
        assert not re.search(r"default: (None|True|False|\(|\[|\)|/)", text), text
    assert parser.description


@pytest.mark.parametrize("command", COMMANDS)
def test_a_ds_config_may_be_written_with_a_hyphen(command, monkeypatch):
    for action in parser_of(command, monkeypatch)._actions:
        if "--ds_config" in action.option_strings:
            assert "--ds-config" in action.option_strings


def test_defaults_are_shown_as_they_are_typed():
    parser = argparse.ArgumentParser(formatter_class=HelpFormatter, prog="x")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--grid", nargs="+", default=(0.1, "a b", "5%"), help="values")
    parser.add_argument("--off", action="store_false", help="turn it off")
    parser.add_argument("--output", help="folder (default: beside the run)")
    options = " ".join(parser.format_help().split("options:")[1].split())
    assert options == (
        "-h, --help show this help message and exit --seed N of the draw (default: 0) "
        "--grid GRID [GRID ...] values (default: 0.1 'a b' 5%) --off turn it off "
        "--output OUTPUT folder (default: beside the run)"
    )


# Options that mean the same in these commands of eval/.
ALIKE = {
    "--micro-batch": ("embed", "knn", "psnr"),
    "--max-steps": ("finetune", "linprobe"),
    "--train": ("attentive", "finetune", "knn", "linprobe"),
    "--files": ("reconstruct", "visualise"),
}


@pytest.mark.parametrize("option", ALIKE)
def test_an_option_of_several_commands_is_explained_in_the_same_words(option, monkeypatch):
    said = set()
    for command in ALIKE[option]:
        actions = parser_of(f"eval.{command}", monkeypatch)._actions
        action = next(one for one in actions if option in one.option_strings)
        said.add((action.metavar, action.help))
    assert len(said) == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_is_called_one_in_every_help(command, monkeypatch):
    actions = parser_of(command, monkeypatch)._actions
    assert "DIR" not in {action.metavar for action in actions}
