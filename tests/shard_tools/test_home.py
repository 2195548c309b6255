"""`~` in command lines, recipes, ds_configs and the environment."""

import json
import os
import pwd
from pathlib import Path

import pytest

from pipeline import doctor, pretrain
from pipeline.config.ds_config import open_ds_config
from pipeline.config.recipe import RecipeError, load_recipe
from pipeline.distributed import extensions_dir
from pipeline.errors import UserError
from shard_tools import verify_shards
from shard_tools.home import expand_home, expand_words
from shard_tools.index_cache import cache_folder

ME = pwd.getpwuid(os.getuid())


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_empty_word_is_no_path():
    for words, what in ((["a", ""], "a path"), (["--x", ""], "--x"), (["--x="], "--x")):
        with pytest.raises(UserError, match=f"^{what} is given as an empty text"):
            expand_words(words)
    fine = ["--slurm", "", "--randaugment=", "--set", "data.randaugment=", "--", "x"]
    assert expand_words(fine) == fine


def test_words_of_a_command_line(home):
    words = ["--output=~/runs", "init.weights=~/x y.pth", "~", "--a=b~/c", "~/d", "e~", "--a=~"]
    words += [
        "s3://b/~/x",
        "timm:vit",
        "./~",
        "./~/x",
        "--x=./~/y",
        "~nobody-here",
        f"~{ME.pw_name}/z",
    ]
    assert expand_words(words) == [
        *(f"--output={home}/runs", f"init.weights={home}/x y.pth", f"{home}", "--a=b~/c"),
        *(f"{home}/d", "e~", f"--a={home}", "s3://b/~/x", "timm:vit", "./~", "./~/x"),
        *("--x=./~/y", "~nobody-here", f"{ME.pw_dir}/z"),
    ]


def test_a_user_that_there_is_not_is_a_sentence(home, capsys):
    words = (
        r"~nobody-here/x: ~nobody-here is not a home folder here, as there is no user 'nobody-here'"
    )
    for text in ("~nobody-here/x",):
        with pytest.raises(UserError, match=words):
            expand_home(text)
        with pytest.raises(UserError, match=words):
            expand_words([f"--data={text}"])
    assert pretrain.main(["--data=~nobody-here/x"]) == 2
    assert doctor.main(["--output", "~nobody-here/x"]) == 2
    with pytest.raises(SystemExit, match="2"):
        verify_shards.main(["~nobody-here/x"])
    for line in capsys.readouterr().err.splitlines():
        assert line.startswith("error: ~nobody-here/x: ")
    (home / "~nobody-here").mkdir()  # one that is really called so
    (home / "~nobody-here/x").touch()
    assert expand_home("~nobody-here/x") == "~nobody-here/x"


def test_a_shard_tool_reads_it(home, capsys):
    assert verify_shards.main(["~/none"]) == 2
    assert f"error: {home}/none: no such folder" in capsys.readouterr().err


def test_values_of_recipes_and_ds_configs(home):
    (home / "base.yaml").write_text("base: ~/mae.yaml\nmonitor: {held_out: ~/val}\n")
    (home / "mae.yaml").write_text("name: x\nmeasure: {kind: reconstruction}\n")
    recipe = load_recipe("~/base.yaml", ["init.weights=timm:vit"])
    assert (recipe.name, recipe.monitor.held_out) == ("x", f"{home}/val")
    assert recipe.init.weights == "timm:vit"
    assert load_recipe("mae", ["init.weights=~/w.pth"]).init.weights == f"{home}/w.pth"
    with pytest.raises(RecipeError, match=r"'init\.weights': ~nobody-here/x: ~nobody"):
        load_recipe("mae", ["init.weights=~nobody-here/x"])
    zero = {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "~/nvme"}}
    (home / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    read = open_ds_config("~/ds.json")["zero_optimization"]
    assert read["offload_param"]["nvme_path"] == f"{home}/nvme"


def test_the_environment(home, monkeypatch):
    monkeypatch.setenv("RELAXMIM_CACHE", "~/cache")
    assert cache_folder() == home / "cache"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "~/ops")
    assert Path(extensions_dir()).parent == home / "ops"
