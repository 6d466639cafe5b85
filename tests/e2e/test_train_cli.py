"""`nibblecore train`, `recipes` and `plot`, as users call them."""

import csv
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from nibblecore.cli import main

QUICK = ("--set", "float.epochs=1", "--set", "epochs=1", "--set", "data.limit=256")


class Command:
    """The command in this process: importing torch again for each call would take longer than what is tested."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capfd = monkeypatch, capfd

    def __call__(self, *arguments: object, status: int = 0) -> tuple[str, str]:
        """What it prints on stdout and stderr."""
        with self.monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["nibblecore", *map(str, arguments)])
            patch.setattr(sys, "path", list(sys.path))
            with pytest.raises(SystemExit) as exit_info:
                main()
        out, err = self.capfd.readouterr()
        assert (exit_info.value.code or 0) == status, out + err
        return out, err

    def json(self, *arguments: object) -> dict[str, Any]:
        values: dict[str, Any] = json.loads(self(*arguments, "--json")[0])
        return values

    def error(self, *arguments: object) -> str:
        return re.sub(r"\s+", " ", self(*arguments, status=1)[1]).strip()


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    monkeypatch.chdir(tmp_path)
    return Command(monkeypatch, capfd)


def test_a_recipe_leaves_a_run(command: Command, tmp_path: Path) -> None:
    values = command.json("train", "--recipe", "digits-ema", *QUICK, "--seed", 3)
    run = tmp_path / "runs" / "digits-ema-seed3"
    assert values["run"] == "runs/digits-ema-seed3"
    assert values["checkpoint"] == "runs/digits-ema-seed3/model.ckpt"
    assert (values["recipe"], values["seed"]) == ("digits-ema", 3)
    assert 0 < values["fake_quant_accuracy"] <= 1
    assert {p.name for p in run.iterdir()} == {
        "curves.png", "float.safetensors", "histograms.npz", "layers.csv", "log.csv", "model.ckpt", "oscillation.png",
        "recipe.toml", "steps.png", "tensorboard", "training.pt", "weights.png",
    }  # fmt: skip
    with (run / "log.csv").open(newline="") as file:
        assert [r["phase"] for r in csv.DictReader(file)] == ["float", "quantized"]
    assert list((run / "tensorboard").iterdir())

    text = command.error("train", "--recipe", "digits-ema", *QUICK, "--seed", 3)
    assert text == (
        "error: runs/digits-ema-seed3 already holds a training. Go on with it by --resume runs/digits-ema-seed3, or "
        "give another --run."
    )
    again = command.json("train", "--resume", run)
    assert again["fake_quant_accuracy"] == values["fake_quant_accuracy"]
    (run / "weights.png").unlink()
    plots = command.json("plot", run)["plots"]
    assert [Path(p).name for p in plots] == ["curves.png", "steps.png", "oscillation.png", "weights.png"]
    assert (run / "weights.png").stat().st_size > 1000


def test_a_checkpoint_and_nothing_else(command: Command, tmp_path: Path) -> None:
    out, err = command("train", "--float-epochs", 1, "--qat-epochs", 0, "--set", "data.limit=256")
    assert [p.name for p in tmp_path.iterdir()] == ["digits.ckpt"]
    # Not a terminal: a line for each epoch instead of a bar.
    assert re.search(r"^float 1/1: loss \d\.\d+, \d+\.\d%$", err, re.MULTILINE)
    assert "checkpoint: digits.ckpt" in out


def test_recipes_are_listed(command: Command) -> None:
    names = command.json("recipes")
    assert names["digits-lsq"].startswith("LSQ")
    keys = command.json("recipes", "--keys")
    assert keys["ema.decay"] == {
        "type": "float",
        "default": "0.0",
        "meaning": "of a step of the optimizer; 0 for no averages",
    }


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ("--recipe", "digits-lsk"),
            r"error: There is no recipe 'digits-lsk'\. Did you mean 'digits-lsq'\? `nibblecore r",
        ),
        (("--set", "qat.epoch=1"), r".*there is no key 'qat\.epoch'\. Did you mean 'epochs'\?"),
        (("--resume", "nowhere"), r"error: nowhere holds no training: there is no recipe\.toml in it\."),
        (
            ("--resume", "nowhere", "--seed", "3"),
            r"error: --resume goes on with the recipe as it was, and takes no other",
        ),
        (
            ("--set", "data.name=nowhere"),
            r"error: There is no data set nowhere: it is no folder, and neither digits nor",
        ),
    ],
)
def test_mistakes(arguments: tuple[str, ...], text: str, command: Command, tmp_path: Path) -> None:
    assert re.match(text, command.error("train", *arguments))
    assert not list(tmp_path.iterdir())


def test_plots_of_nothing(command: Command, tmp_path: Path) -> None:
    assert command.error("plot", tmp_path).endswith("No such file or directory. Name the folder of a training.")


def test_results_of_an_unknown_method(command: Command) -> None:
    text = command.error("results", "--methods", "lsq,lsx")
    assert text.startswith("error: there is no method 'lsx'. Methods: ptq, ")
    assert command.error("results", "--bits", "four") == "error: --bits must be numbers such as 4,3,2, not 'four'."
