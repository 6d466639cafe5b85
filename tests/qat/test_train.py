"""The digits recipe: split, progress, determinism, accuracy, errors."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from nibblecore import ir
from nibblecore.errors import DataError, TrainingError
from nibblecore.qat import checkpoint_facts, convert, load_checkpoint
from nibblecore.qat.recipes import digits
from nibblecore.qat.train import Progress, accuracy, check_loss, train_digits


def test_split_is_fixed_and_stratified() -> None:
    data = digits.load()
    assert data.train_images.shape == (1437, 1, 8, 8)
    assert data.test_images.shape == (360, 1, 8, 8)
    assert (data.train_images.dtype, data.train_labels.dtype) == (np.float32, np.int64)
    assert (float(data.train_images.min()), float(data.train_images.max())) == (0, 1)
    assert set(np.bincount(data.test_labels)) <= {35, 36, 37}
    again = digits.load()
    assert np.array_equal(data.test_images, again.test_images)
    # No test image is also a training image.
    seen = {image.tobytes() for image in data.train_images}
    assert not any(image.tobytes() in seen for image in data.test_images)


def test_shifts_move_by_up_to_a_pixel() -> None:
    image = torch.zeros(500, 1, 8, 8)
    image[:, 0, 3, 4] = 1
    moved = digits.shift_randomly(image, torch.Generator().manual_seed(0))
    assert bool((moved.sum((1, 2, 3)) == 1).all())
    places = {tuple(p) for p in moved[:, 0].nonzero()[:, 1:].tolist()}
    assert places == {(r, c) for r in (2, 3, 4) for c in (3, 4, 5)}


def test_short_training_to_integers_and_back(tmp_path: Path) -> None:
    path = tmp_path / "digits.safetensors"
    seen: list[Progress] = []
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    result = train_digits(7, float_epochs=3, qat_epochs=1, checkpoint=path, progress=seen.append)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [(p.phase, p.epoch, p.epochs) for p in seen] == [
        ("float", 1, 3), ("float", 2, 3), ("float", 3, 3), ("quantized", 1, 1)
    ]  # fmt: skip
    assert seen[0].loss > seen[2].loss
    assert result.float_accuracy == seen[2].accuracy > 0.9
    assert result.fake_quant_accuracy == seen[3].accuracy > 0.9

    facts = checkpoint_facts(path)
    assert facts == {
        "float_accuracy": result.float_accuracy,
        "fake_quant_accuracy": result.fake_quant_accuracy,
        "seed": 7,
    }
    data = digits.load()
    images, labels = torch.from_numpy(data.test_images), torch.from_numpy(data.test_labels)
    loaded = load_checkpoint(path)
    assert accuracy(loaded, images, labels) == result.fake_quant_accuracy

    graph = convert(loaded)
    codes = ir.run(graph, {"x": ir.quantize(data.test_images, graph.tensors["x"])})["classifier"]
    logits = ir.dequantize(codes, graph.tensors["classifier"])[:, :, 0, 0]
    with torch.no_grad():
        agreement = (logits.argmax(1) == loaded(images).argmax(1).numpy()).mean()
    assert agreement >= 0.997, f"integers and fake quantization agree on {agreement:.1%}"


def test_the_same_seed_gives_the_same_model() -> None:
    first, second = (train_digits(3, float_epochs=1, qat_epochs=1) for _ in range(2))
    other = train_digits(4, float_epochs=1, qat_epochs=0)
    states = [r.model.state_dict() for r in (first, second, other)]
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())
    assert not torch.equal(states[0]["classifier.weight"], states[2]["classifier.weight"])


@pytest.mark.slow
def test_full_training_keeps_the_accuracy() -> None:
    result = train_digits(0)
    assert result.float_accuracy >= 0.98
    assert result.fake_quant_accuracy >= result.float_accuracy - 0.01


def test_a_loss_that_is_no_number_stops() -> None:
    assert check_loss(torch.tensor(0.5), "float epoch 1") == 0.5
    for bad, shown in ((math.nan, "nan"), (math.inf, "inf")):
        text = rf"^The loss is {shown} in float epoch 2\.\nTrain again with a smaller learning rate\.$"
        with pytest.raises(TrainingError, match=text):
            check_loss(torch.tensor(bad), "float epoch 2")


def test_a_broken_image_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    data = digits.load()
    data.train_images[100] = math.nan
    monkeypatch.setattr(digits, "load", lambda: data)
    text = r"^Of the train images of digits, image 100 has values that are not finite\.\nLeave it out\.$"
    with pytest.raises(DataError, match=text):
        train_digits(float_epochs=1, qat_epochs=0)


def test_arguments() -> None:
    with pytest.raises(ValueError, match=r"^float_epochs must be at least 1 and qat_epochs 0, not 0 and 1$"):
        train_digits(float_epochs=0, qat_epochs=1)


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    text = r"^The digits come with scikit-learn, which is not installed\.\nRun: pip install nibblecore\[train\]$"
    with pytest.raises(TrainingError, match=text):
        digits.load()
