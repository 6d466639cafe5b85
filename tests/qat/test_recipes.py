"""Recipes: what ships is valid, inheritance, settings, and an error text for everything that can be wrong."""

from pathlib import Path

import pytest

from nibblecore.errors import RecipeError
from nibblecore.qat import METHODS, IaoOptions, Override
from nibblecore.qat.presets import PRESETS
from nibblecore.qat.training import builtin_recipes, load_recipe
from nibblecore.qat.training.recipe import FOLDER, describe_keys, dump_toml

MINIMAL = '[model]\nfactory = "a:b"\n[data]\nname = "digits"\n'


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_the_packages_recipes_are_valid() -> None:
    names = builtin_recipes()
    assert {"digits", "digits-lsq", "digits-bin-regularization", "digits-ema-qc", "digits-fqn"} <= set(names)
    for name, summary in names.items():
        recipe = load_recipe(name)
        assert recipe.name == name
        assert summary
        assert len(summary) <= 80
        assert recipe.model.factory.startswith("nibblecore.models.")
    assert {load_recipe(n).quantization.method for n in names} == set(METHODS)
    assert load_recipe("digits-bin-regularization").bin_regularization.weight == 0.5
    assert load_recipe("digits-fqn").quantization.options == (IaoOptions(quantile=0.999),)


def test_recipes_travel_with_the_package() -> None:
    assert FOLDER.name == "recipes"
    assert (FOLDER / "digits.toml").is_file()


@pytest.mark.parametrize("name", sorted(builtin_recipes()))
def test_a_resolved_recipe_is_the_same_recipe(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name, ("seed=3", "qat.lr=0.5"))
    again = load_recipe(write(tmp_path / "recipe.toml", recipe.to_toml()))
    assert again.identity() == recipe.identity()
    assert again.run.seed == 3


def test_a_base_gives_what_is_not_said(tmp_path: Path) -> None:
    write(tmp_path / "base.toml", MINIMAL + "[qat]\nepochs = 3\nlr = 0.1\n[quantization]\nweight_bits = 3\n")
    write(tmp_path / "middle.toml", 'base = "base.toml"\n[qat]\nlr = 0.2\n')
    path = write(
        tmp_path / "top.toml",
        'base = "./middle.toml"\nsummary = "s"\n[quantization]\nact_bits = 2\n'
        '[[quantization.overrides]]\npattern = "stem.*"\nweight_bits = 8\n',
    )
    recipe = load_recipe(path)
    assert (recipe.qat.epochs, recipe.qat.lr) == (3, 0.2)
    assert (recipe.quantization.weight_bits, recipe.quantization.act_bits) == (3, 2)
    assert recipe.quantization.overrides == (Override(pattern="stem.*", weight_bits=8),)
    assert load_recipe(path, ("quantization.overrides=[]",)).quantization.overrides == ()
    assert load_recipe(write(tmp_path / "own.toml", 'base = "digits"\n')).data.shift == 1


def test_options_of_another_method_stay_behind(tmp_path: Path) -> None:
    path = write(tmp_path / "r.toml", 'base = "digits-fqn"\n[quantization]\nmethod = "lsq"\n')
    assert load_recipe(path).quantization.options == ()


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_are_recipes(name: str, tmp_path: Path) -> None:
    preset = PRESETS[name]()
    path = write(tmp_path / "r.toml", f'base = "digits-lsq"\n[preset]\nname = "{name}"\n')
    recipe = load_recipe(path)
    assert (recipe.data.name, recipe.data.shift) == ("digits", 1)
    assert recipe.quantization == preset.qconfig
    for table, values in preset.training.items():
        for key, value in values.items():
            assert getattr(getattr(recipe, table), key) == value, f"{table}.{key}"
    path.write_text(path.read_text() + "[qat]\nepochs = 7\n")
    assert load_recipe(path).qat.epochs == 7


def test_wrong_presets(tmp_path: Path) -> None:
    path = write(tmp_path / "r.toml", MINIMAL + '[preset]\nname = "fqm"\n')
    with pytest.raises(RecipeError, match=rf"^{path}: there is no preset 'fqm'\. Did you mean 'fqn'\?\nPresets: bin_"):
        load_recipe(path)
    path.write_text(MINIMAL + '[preset]\nname = "fqn"\nbits = 5\n')
    with pytest.raises(RecipeError, match=rf"^{path}: preset 'fqn': bits must be 2, 3, 4 or 8, not 5\.$"):
        load_recipe(path)
    path.write_text(MINIMAL + '[preset]\nname = "fqn"\nbit = 4\n')
    with pytest.raises(
        RecipeError, match=rf"^{path}: preset 'fqn': fqn\(\) got an unexpected keyword argument 'bit'\.$"
    ):
        load_recipe(path)
    path.write_text('preset = "fqn"\n' + MINIMAL)
    with pytest.raises(RecipeError, match=rf"^{path}: preset must be a table with a name, as in preset = \{{ name = "):
        load_recipe(path)


def test_settings() -> None:
    recipe = load_recipe("digits", ("bits=3", "epochs=2", "lr=0.1", "run.seed=7", "method=pact", "data.flip=true"))
    assert (recipe.quantization.weight_bits, recipe.quantization.act_bits) == (3, 3)
    assert (recipe.qat.epochs, recipe.qat.lr, recipe.qat.step_lr, recipe.run.seed) == (2, 0.1, 0.1, 7)
    assert recipe.quantization.method == "pact"
    assert recipe.data.flip


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        (
            "qat.epoch=3",
            r"there is no key 'qat\.epoch'\. Did you mean 'epochs'\?\nKeys of \[qat\]: epochs, optimizer, .*$",
        ),
        ("qats.epochs=3", r"there is no table 'qats'\. Did you mean 'qat'\?\nTables: summary, quantization, .*$"),
        ("qat.epochs=2.5", r"qat\.epochs must be an integer, not 2\.5\.$"),
        ("qat.epochs=-1", r"qat\.epochs must be at least 0, not -1\.$"),
        ("qat.lr=nan", r"qat\.lr must be finite, not nan\.$"),
        ("qat.lr=0", r"qat\.lr must be above 0, not 0\.0\.$"),
        ("qat.momentum=1", r"qat\.momentum must be at least 0 and below 1, not 1\.0\.$"),
        ("qat.optimizer=rms", r"qat\.optimizer must be 'sgd' or 'adam', not 'rms'\.$"),
        ("data.channels=2", r"data\.channels must be 0, 1 or 3, not 2\.$"),
        ("data.flip=1", r"data\.flip must be true or false, not 1\.$"),
        ("data.name=3", r"data\.name must be a text, not 3\.$"),
        ("quantization.bits=3", r"there is no key 'quantization\.bits'\..*\nKeys of \[quantization\]: method, .*$"),
        ("bits=5", r"quantization: weight_bits must be 2, 3, 4 or 8, not 5\.$"),
        ("method=lsx", r"quantization: method must be 'dorefa', 'iao', 'lsq', .* or 'tqt', not 'lsx'\.$"),
        ("quantization.options.lsq.grad_scale=3", r"quantization: grad_scale of LsqOptions must be .*$"),
        ("quantization.options.pact.x=3", r"quantization: options\.pact: no training method 'pact' has options\.$"),
        (
            "freezing.first=0.1",
            r"freezing\.first and freezing\.last must both be above 0, or both 0 for no freezing\.$",
        ),
        ("qat.clipping_penalty=1", r"qat\.clipping_penalty goes with the method 'pact', not 'lsq'\.$"),
        ("threshold_freezing.every=2", r"threshold_freezing\.every goes with the method 'tqt', not 'lsq'\.$"),
        ("batch_norm.reestimate_batches=2", r"batch_norm\.reestimate_batches needs quantization\.batch_norm = .*$"),
    ],
)
def test_wrong_values(setting: str, text: str) -> None:
    with pytest.raises(RecipeError, match=rf"(?s)^{FOLDER / 'digits.toml'} with --set: {text}"):
        load_recipe("digits", (setting,))


def test_wrong_settings() -> None:
    with pytest.raises(RecipeError, match=r"^--set epochs: write key=value, as in --set qat\.epochs=5\.$"):
        load_recipe("digits", ("epochs",))
    text = (
        r"^--set epoch=3: there is no key 'epoch'\. Did you mean 'epochs'\?\nWrite table\.key=value, or one of seed, "
    )
    with pytest.raises(RecipeError, match=text):
        load_recipe("digits", ("epoch=3",))


def test_combinations() -> None:
    with pytest.raises(RecipeError, match=r": dampening needs codes of w / step, which the method 'dorefa' does not"):
        load_recipe("digits-dampening", ("method=dorefa",))
    with pytest.raises(RecipeError, match=r": freezing needs oscillation\.track = true\.$"):
        load_recipe("digits-freezing", ("oscillation.track=false",))


def test_wrong_files(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"^There is no recipe 'digits-lsk'\. Did you mean 'digits-lsq'\?\n`nibblecore "
    ):
        load_recipe("digits-lsk")
    with pytest.raises(RecipeError, match=rf"^There is no recipe file {tmp_path}/none\.toml\.$"):
        load_recipe(tmp_path / "none.toml")
    path = write(tmp_path / "broken.toml", "[qat\n")
    with pytest.raises(RecipeError, match=rf"^{path} is no TOML: .*line 1.*\.$"):
        load_recipe(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match=rf"^{path} is no text: "):
        load_recipe(path)
    path = write(tmp_path / "bare.toml", "")
    with pytest.raises(
        RecipeError, match=rf"^{path}: model\.factory is missing: package\.module:function of the float "
    ):
        load_recipe(path)
    path = write(tmp_path / "bare.toml", '[model]\nfactory = "a:b"\n')
    with pytest.raises(RecipeError, match=rf"^{path}: data\.name is missing: a data set such as digits, or a folder"):
        load_recipe(path)
    path = write(tmp_path / "flat.toml", "qat = 3\n" + MINIMAL)
    with pytest.raises(RecipeError, match=rf"^{path}: qat must be a table, \[qat\], not 3\.$"):
        load_recipe(path)
    path = write(tmp_path / "own.toml", 'base = "own.toml"\n')
    with pytest.raises(RecipeError, match=rf"^{path} is its own base, through {path}\.$"):
        load_recipe(path)
    path = write(tmp_path / "number.toml", "base = 3\n")
    with pytest.raises(RecipeError, match=rf"^{path}: base must be the name or path of a recipe, not 3\.$"):
        load_recipe(path)


def test_every_key_is_described() -> None:
    keys = {key: (kind, default, doc) for key, kind, default, doc in describe_keys()}
    assert keys["qat.lr"] == ("float", "0.01", "learning rate, the highest of the schedule")
    assert keys["qat.optimizer"][2].endswith("(sgd, adam)")
    assert all(doc for _, _, doc in keys.values())


def test_toml_that_is_written_is_read() -> None:
    import tomllib

    content = {
        "a": 'quotes " and \\ and ü\n\x7f',
        "b": [1, 2.5, True],
        "c": {"d": {"e+": 1e-7}, "list": [{"x": 1}, {"x": 2, "y": "z"}]},
    }
    assert tomllib.loads(dump_toml(content)) == content
