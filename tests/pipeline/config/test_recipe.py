"""Recipes: what ships loads, what is wrong is refused."""

import pytest

from pipeline.config.recipe import RECIPES, RecipeError, differences, dump_recipe, load_recipe

SHIPPED = sorted(p.stem for p in RECIPES.glob("*.yaml") if p.stem != "demo_size")


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_load_and_survive_a_round_trip(name, tmp_path):
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    assert recipe.name == name
    copy = tmp_path / "recipe.yaml"
    copy.write_text(dump_recipe(recipe))
    assert load_recipe(copy) == recipe


def test_paper_settings():
    mae, rmae, cmae = (load_recipe(RECIPES / f"{n}.yaml") for n in ("mae", "rmae", "cmae"))
    assert (mae.batch_size, mae.optimizer.base_lr, mae.lr) == (1024, 1.5e-4, 6e-4)
    assert mae.optimizer.betas == (0.9, 0.95)
    assert (mae.optimizer.epochs, mae.optimizer.warmup_epochs) == (100, 20)
    assert mae.optimizer.weight_decay.value == 0.05
    assert mae.optimizer.gradient_clipping == 0.0
    assert mae.data.crop.scale == (0.2, 1.0)
    assert rmae.optimizer.base_lr == 3.0e-4
    assert rmae.measure.lambda_ == 1.0
    assert cmae.optimizer.base_lr == 1.5e-4
    assert (cmae.measure.temperature, cmae.measure.negatives, cmae.measure.tokens) == (
        0.2, "position", "patch",
    )  # fmt: skip
    assert (cmae.measure.heads.hidden, cmae.measure.heads.out) == (2048, 768)
    assert (cmae.ema.momentum, cmae.ema.schedule) == (0.996, "constant")
    jitter = cmae.views.jitter
    assert (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) == (
        0.4, 0.4, 0.4, 0.1,
    )  # fmt: skip
    assert (jitter.probability, jitter.grayscale, jitter.where) == (0.8, 0.0, "visible")


def test_another_optimizer_keeps_the_recipes_settings_in_any_order():
    """Only a measure has keys of its own kind."""
    changes = ["optimizer.layer_anneal=0.5", "optimizer.kind=muon", "optimizer.epochs=30"]
    for words in (changes, changes[::-1]):
        recipe = load_recipe(RECIPES / "rmae.yaml", words).optimizer
        assert (recipe.kind, recipe.layer_anneal, recipe.epochs) == ("muon", 0.5, 30)
        assert recipe.base_lr == 3.0e-4  # the recipe's, not the default


def test_overrides_reach_every_depth_and_replace_a_measure_of_another_kind():
    recipe = load_recipe(
        RECIPES / "cmae.yaml",
        ["optimizer.epochs=400", "views.jitter.hue=0.2", "measure={kind: byol, tokens: cls}"],
    )
    assert recipe.optimizer.epochs == 400
    assert recipe.views.jitter.hue == 0.2
    assert recipe.measure.kind == "byol"
    assert not hasattr(recipe.measure, "temperature")


def test_a_kind_of_measure_is_set_in_any_order_with_its_keys(tmp_path):
    words = ["measure.tokens=mean_patch", "measure.kind=byol", "measure.symmetric=true"]
    for order in (words, words[::-1]):
        measure = load_recipe("cmae", order).measure
        assert (measure.kind, measure.tokens, measure.symmetric) == ("byol", "mean_patch", True)
    with pytest.raises(RecipeError, match=r"measure\.temperature'; only measure\.kind infonce"):
        load_recipe("cmae", ["measure.temperature=0.1", "measure.kind=byol"])
    (tmp_path / "tokens.yaml").write_text("measure: {tokens: cls}\n")
    (tmp_path / "mine.yaml").write_text(
        "base: tokens.yaml\nname: mine\nviews: {second: none}\nmeasure: {kind: byol}\n"
    )
    assert load_recipe(tmp_path / "mine.yaml").measure.tokens == "cls"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.lr=1", ["optimizer.lr", "base_lr"]),
        ("measure.tau=1", ["measure.tau", "temperature"]),
        ("views.jitter.contarst=1", ["views.jitter.contarst", "contrast"]),
        ("seed=abc", ["seed", "integer"]),
        ("optimizer.base_lr=-1", ["optimizer.base_lr", "greater than 0"]),
        ("views.second=half", ["views.second", "complement"]),
        ("views.second=pixels", ["views.second", "complement"]),
        ("encoder.masked_tokens=drop", ["encoder.masked_tokens", "mean_patch or cls"]),
        ("measure.kind=l2", ["measure.kind", "infonce"]),
        ("batch_size=1000", ["batch_size 1000", "data.partitions 64"]),
        ("optimizer.epochs=20", ["warmup_epochs 20", "epochs 20"]),
        ("optimizer", ["--set 'optimizer'", "key.subkey=value"]),
        ("nosuch.key=1", ["nosuch", "valid keys"]),
        ("lr=1", ["'lr'", "did you mean optimizer.base_lr?"]),
        ("mask_ratio=0.6", ["'mask_ratio'", "did you mean views.mask_ratio?"]),
        ("batch=8", ["'batch'", "did you mean batch_size?"]),
        ("data.epochs=8", ["'data.epochs'", "did you mean optimizer.epochs?"]),
        ("measure.lambda=1", ["'measure.lambda'; only measure.kind reconstruction has it;"]),
        ("jitter.hue=0.1", ["'jitter'", "did you mean views.jitter?"]),
        ("weight_decay=0.1", ["'weight_decay'", "did you mean optimizer.weight_decay.value?"]),
        ("views.hide=0.75", ["'views.hide'", "it is now views.mask_ratio"]),
        ("encoder.hidden=drop", ["'encoder.hidden'", "it is now encoder.masked_tokens"]),
        ("encoder.style=mae", ["it is now encoder.init"]),
        ("measure.tokens=class", ["'class'; it is now cls"]),
        ("measure.tokens=mean", ["'mean'; it is now mean_patch"]),
        ("encoder.masked_tokens=token", ["'token'; it is now replace"]),
        ("optimizer.betas=[0.9, 1]", ["optimizer.betas.1", "less than 1"]),
        ("optimizer.betas=0.9", ["optimizer.betas", "should be a list"]),
        ("optimizer.min_lr=7e-4", ["min_lr 0.0007 is above the peak learning rate 0.0006"]),
        ("optimizer.epochs=yes", ["optimizer.epochs", "a number, not true or false", "got True"]),
        ("data.crop.scale=[off, on]", ["data.crop.scale", "a number, not true or false"]),
        ("data.workers=99999999", ["data.workers", "less than or equal to 1024"]),
        ("optimizer.epochs=1:30", ["optimizer.epochs", "got '1:30'"]),
        ("views={mask_ratio: 0.5, mask_ratio: 0.6}", ["key 'mask_ratio' is there twice"]),
        ("views=null", ["'views': input should be a mapping of keys, got None"]),
        ("measure={tokens: cls, negatives: image}", ["tokens cls is one token", "position or all"]),
        ("data.mean=[123.675, 116.28, 103.53]", ["data.mean.0", "less than or equal to 1"]),
        ("data.std=[58.395, 57.12, 57.375]", ["data.std.0", "less than or equal to 1"]),
        ("views.second_mask_ratio=0.5", ["second_mask_ratio 0.5", "views.second is complement"]),
        ("init.ema=true", ["init.ema does nothing without init.weights"]),
        ("optimizer.epochs=1e308", ["optimizer.epochs", "less than or equal to 1000000000000000"]),
        ("optimizer.base_lr=1e308", ["optimizer.base_lr", "less than or equal to"]),
        ("optimizer.eps=5e-324", ["optimizer.eps", "greater than or equal to 0.000"]),
        ("optimizer.eps=1e308", ["optimizer.eps", "less than or equal to 1000"]),
        ("optimizer.weight_decay.value=1e308", ["weight_decay.value", "less than or equal to"]),
        ("optimizer.layer_anneal=5e-324", ["layer_anneal 4.94066e-324", "be inf, must be at most"]),
        ("data.std=[0.2, 5e-324, 0.2]", ["data.std.1", "greater than or equal to 0.000001"]),
        ("data.window=99999999999999999999", ["data.window", "less than or equal to"]),
        ("data.samples_per_epoch=99999999999999999999", ["samples_per_epoch", "less than or eq"]),
        ("name=''", ["'name'", "not empty"]),
        ("name=../x", ["'name'", "without /", "got '../x'"]),
    ],
)
def test_bad_values_are_one_sentence_that_names_the_key(override, words):
    with pytest.raises(RecipeError) as error:
        load_recipe(RECIPES / "cmae.yaml", [override])
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_a_key_of_other_measures_names_them():
    with pytest.raises(
        RecipeError, match=r"'measure\.heads'; only measure\.kind infonce and byol have"
    ):
        load_recipe(RECIPES / "mae.yaml", ["measure.heads.out=8"])


@pytest.mark.parametrize("name", ["mae", "mae.yaml"])
def test_a_recipe_builds_on_a_bundled_one_by_name(name, tmp_path, monkeypatch):
    """From any folder, also where the current one has a file of that name."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "mae.yaml").write_text("name: other\n")
    monkeypatch.chdir(tmp_path / "here")
    path = tmp_path / "mine.yaml"
    path.write_text(f"base: [{name}]\nname: mine\nbatch_size: 512\n")
    assert load_recipe(path) == load_recipe("mae", ["name=mine", "batch_size=512"])
    (tmp_path / "mae").mkdir()  # a checkout of MAE
    assert load_recipe(path).batch_size == 512
    (tmp_path / "mae.yaml").write_text(f"base: {RECIPES / 'rmae.yaml'}\n")  # one's own beside it
    assert load_recipe(path).views.second == {"mae": "pixels", "mae.yaml": "complement"}[name]
    path.write_text("base: maee\nname: mine\n")
    with pytest.raises(RecipeError, match=r"mine\.yaml: base: .*/maee: .*did you mean mae\?"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- 1\n", "mapping"),
        ("a: [\n", "not valid YAML: line 2, column 1: expected the node content"),
        ("name: x\nb:\n\tc: 1\n", r"not valid YAML: line 3, column 1: found character '\\t'"),
        ("base: other.x.yaml\n", "cannot be read"),
        ("base: x.yaml\nname: x\n", "circle"),
        ("base: ./here/x.yaml\nname: x\n", "circle"),
        ("name: x\nname: y\n", "key 'name' is there twice"),
        ("base: 3\n", "base"),
        ("!!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("name: x\n", "measure"),
    ],
)
def test_bad_files_are_refused(text, words, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    (tmp_path / "here").symlink_to(".")
    with pytest.raises(RecipeError, match=words) as error:
        load_recipe(path)
    assert "x.yaml" in str(error.value)


def test_numbers_are_read_as_they_are_written(tmp_path):
    """YAML 1.1 reads 010 as 8; a merge key is no key that is there twice; a file may begin with a
    byte order mark and end its lines as Windows does."""
    path = tmp_path / "mine.yaml"
    text = (
        f"base: {RECIPES / 'mae.yaml'}\nname: mine\nseed: 010\nviews: &v\n  <<: {{cutmix: 0.25}}\n"
    )
    path.write_bytes(b"\xef\xbb\xbf" + f"{text}  cutmix: 1\n".replace("\n", "\r\n").encode())
    recipe = load_recipe(path, ["batch_size=2_048", "optimizer.base_lr=1e-3", "data.window=0x10"])
    assert (recipe.seed, recipe.views.cutmix, recipe.batch_size) == (10, 1.0, 2048)
    assert (recipe.optimizer.base_lr, recipe.data.window) == (1e-3, 16)
    assert recipe.optimizer.betas == (0.9, 0.95)
    assert load_recipe("mae", ["measure.norm_pix=no"]).measure.norm_pix is False
    words = ["encoder.options={init_values: 1e-5, mlp_ratio: 4}", "data.window=1e1", "name='1e5'"]
    recipe = load_recipe("mae", words)
    assert recipe.encoder.options == {"init_values": 1e-5, "mlp_ratio": 4}
    assert (recipe.data.window, recipe.name) == (10, "1e5")
    path.write_text(dump_recipe(recipe))
    assert load_recipe(path) == recipe


def test_a_bare_name_is_the_bundled_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_recipe("mae") == load_recipe(RECIPES / "mae.yaml") == load_recipe("mae.yaml")
    words = r"maee: cannot be read \(no such file\); did you mean mae\? bundled are: .*cmae, .*rmae"
    with pytest.raises(RecipeError, match=words) as error:
        load_recipe("maee")
    assert "demo_size" not in str(error.value)  # others build on it, it trains nothing
    with pytest.raises(RecipeError, match="file\\); bundled are: "):
        load_recipe("dino")
    (tmp_path / "rmae").mkdir()  # a checkout of that name, say, is no recipe
    assert load_recipe("rmae") == load_recipe(RECIPES / "rmae.yaml")
    with pytest.raises(RecipeError, match=r"x/mae.yaml: cannot be read \(no such file\)$"):
        load_recipe("x/mae.yaml")
    (tmp_path / "mae").write_text((RECIPES / "mae.yaml").read_text().replace("0.75", "0.5"))
    assert load_recipe("mae").views.mask_ratio == 0.5  # a file of that name goes first


def test_differences_ignore_what_changes_no_result():
    a = load_recipe(RECIPES / "mae.yaml")
    assert differences(a, load_recipe(RECIPES / "mae.yaml", ["monitor.log_steps=3"])) == []
    assert differences(a, load_recipe(RECIPES / "mae.yaml", ["data.workers=3"])) == []
    changed = load_recipe(RECIPES / "mae.yaml", ["optimizer.betas=[0.9, 0.99]"])
    assert "optimizer.betas" in str(differences(a, changed))


def test_mean_and_std_of_the_manifest(tmp_path):
    words = ["data.mean=manifest", "data.std=manifest"]
    measured = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "images": 9}
    recipe = load_recipe("mae", words, measured)
    assert recipe.data.mean == (0.1, 0.2, 0.3)
    assert recipe.data.std == (0.4, 0.5, 0.6)
    (tmp_path / "mine.yaml").write_text(f"base: {RECIPES / 'mae.yaml'}\ndata: {{std: manifest}}\n")
    assert load_recipe(tmp_path / "mine.yaml", (), measured).data.std == (0.4, 0.5, 0.6)
    with pytest.raises(RecipeError, match=r"data\.mean: manifest stands for what make_shards"):
        load_recipe("mae", words)


@pytest.mark.parametrize("key", ["mlp_ratio", "init_values"])
@pytest.mark.parametrize("value", [".inf", ".nan", "9999999999999999999999", "0", "null"])
def test_an_option_of_the_encoder_that_nothing_can_be_built_with(key, value):
    with pytest.raises(RecipeError, match=f"{key}: input should be"):
        load_recipe(RECIPES / "mae.yaml", [f"encoder.options.{key}={value}"])
