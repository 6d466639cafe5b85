"""Data sets of trainings: folders, archives and factories, and a sentence for each way in which they can be broken."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nibblecore.errors import DataError
from nibblecore.qat.recipes import digits
from nibblecore.qat.training import DataSet, TensorSplit, open_data
from nibblecore.qat.training.data import augment
from nibblecore.qat.training.recipe import DataSection


def section(name: object, **settings: object) -> DataSection:
    return DataSection(**{"name": str(name), "batch": 2, **settings})  # type: ignore[arg-type]


def picture(path: Path, seed: int, size: tuple[int, int] = (6, 5), mode: str = "L") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (*size, 3) if mode == "RGB" else size
    values = np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)
    Image.fromarray(values, mode).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten pictures of each of two classes."""
    for label, name in enumerate(("cat", "dog")):
        for k in range(10):
            picture(tmp_path / "set" / name / f"{k}.png", 10 * label + k)
    return tmp_path / "set"


def test_a_folder_is_split(folder: Path) -> None:
    data = open_data(section(folder, channels=1))
    assert (len(data.train), len(data.test), data.classes) == (16, 4, 2)
    images, labels = data.train.batch(torch.arange(16))
    assert images.shape == (16, 1, 6, 5)
    assert images.dtype == torch.float32
    assert labels.tolist() == [0] * 8 + [1] * 8
    assert isinstance(data.train, TensorSplit)
    assert isinstance(data.test, TensorSplit)
    assert data.train.names is not None
    assert data.test.names is not None
    assert not set(data.train.names) & set(data.test.names)
    first = np.asarray(Image.open(data.train.name(0)), dtype=np.float32) / 255
    assert np.array_equal(images[0, 0].numpy(), first)
    again = open_data(section(folder, channels=1)).test
    assert isinstance(again, TensorSplit)
    assert again.names == data.test.names
    assert open_data(section(folder)).train.batch(torch.arange(2))[0].shape == (2, 3, 6, 5)
    assert open_data(section(folder, image_size=4)).train.batch(torch.arange(2))[0].shape == (2, 3, 4, 4)


def test_a_folder_with_its_own_split(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "both").mkdir()
    folder.rename(tmp_path / "both" / "train")
    picture(tmp_path / "both" / "val" / "dog" / "a.png", 50)
    data = open_data(section(tmp_path / "both", channels=1))
    assert (len(data.train), len(data.test)) == (20, 1)
    assert data.test.batch(torch.arange(1))[1].tolist() == [1]
    picture(tmp_path / "both" / "val" / "cow" / "a.png", 51)
    with pytest.raises(DataError, match=r"^.*/val/cow is a class that .*/both/train does not have\.$"):
        open_data(section(tmp_path / "both"))


def test_a_broken_image_is_named(folder: Path) -> None:
    path = folder / "dog" / "3.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match=rf"^{path} is a broken image, or none: .*\nReplace it, or leave it out\.$"):
        open_data(section(folder))
    path.write_bytes(b"")
    with pytest.raises(DataError, match=rf"^{path} is a broken image, or none: "):
        open_data(section(folder))


def test_images_of_another_size(folder: Path) -> None:
    path = picture(folder / "dog" / "x.png", 99, (7, 5))
    text = (
        rf"^{path} is uint8 of shape \(1, 7, 5\), and .*/cat/.*\.png is uint8 of shape \(1, 6, 5\)\.\nSet data\.image_"
    )
    with pytest.raises(DataError, match=text):
        open_data(section(folder, channels=1, test_share=0.01))
    assert len(open_data(section(folder, channels=1, image_size=5)).train) == 17


def test_an_empty_image(folder: Path) -> None:
    path = folder / "cat" / "0.png"
    Image.fromarray(np.full((6, 5), 51, np.uint8)).save(path)
    text = rf"^Of the (train|test) images of .*, {path} is empty: all of its values are 0\.2\.\nLeave it out, or set "
    with pytest.raises(DataError, match=text):
        open_data(section(folder, channels=1))
    open_data(section(folder, channels=1, allow_constant=True))


def test_folders_without_images(tmp_path: Path, folder: Path) -> None:
    text = (
        rf"^There is no data set {tmp_path}/none: it is no folder, and neither digits nor digits-noisy\.\nGive a folder"
    )
    with pytest.raises(DataError, match=text):
        open_data(section(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"/empty has no subfolders; it must have one of images for each class\.$"):
        open_data(section(tmp_path / "empty"))
    (folder / "owl").mkdir()
    with pytest.raises(DataError, match=rf"^{folder}/owl has no images; known are \.bmp, "):
        open_data(section(folder))


def arrays(**changes: object) -> dict[str, object]:
    random = np.random.default_rng(1)
    content: dict[str, object] = {
        "train_images": random.integers(0, 256, (6, 4, 4)).astype(np.uint8),
        "train_labels": np.arange(6) % 3,
        "test_images": random.integers(0, 256, (3, 4, 4)).astype(np.uint8),
        "test_labels": np.arange(3),
    }
    return {k: v for k, v in {**content, **changes}.items() if v is not None}


def test_an_archive(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    np.savez(path, **arrays())  # type: ignore[arg-type]
    data = open_data(section(path))
    assert (len(data.train), len(data.test), data.classes) == (6, 3, 3)
    assert data.train.batch(torch.arange(2))[0].shape == (2, 1, 4, 4)
    limited = open_data(section(path, limit=4))
    assert len(limited.train) == 4
    text = rf"^{path} has 4 training images, fewer than a batch of 5\.\nSet data\.batch to a smaller number\.$"
    with pytest.raises(DataError, match=text):
        open_data(section(path, limit=4, batch=5))


BAD: list[tuple[dict[str, object], str]] = [
    ({"train_images": None}, r"has no array 'train_images'; it must have train_images, train_labels, "),
    ({"train_images": np.zeros((6, 4))}, r": train_images is float64 of shape \(6, 4\); it must be uint8 or floating "),
    (
        {"test_labels": np.zeros(3)},
        r": test_labels is float64 of shape \(3,\); it must be integers, one for each image",
    ),
    ({"test_labels": np.arange(2)}, r": test_labels is int64 of shape \(2,\); it must be integers, one for each "),
    ({"test_labels": np.array([0, 1, 3])}, r"image 2 has the label 3; classes are 0\.\.2\.\nCorrect the label"),
    (
        {"test_labels": np.array([0, -1, -1])},
        r"image 1 has the label -1 \(and 1 more in its batch\)|image 1 has the label -1",
    ),
    (
        {"train_images": np.full((6, 4, 4), np.nan)},
        r"Of the train images of .*, image 0 has values that are not finite \(",
    ),
    (
        {"train_images": np.random.default_rng(1).uniform(0, 255, (6, 4, 4))},
        r"image 0 has values in .*, outside of 0\.\.1",
    ),
    (
        {"train_images": np.zeros((0, 4, 4)), "train_labels": np.arange(0)},
        r"^There are no images among the train images",
    ),
]


@pytest.mark.parametrize(("changes", "text"), BAD)
def test_broken_archives(tmp_path: Path, changes: dict[str, object], text: str) -> None:
    path = tmp_path / "set.npz"
    np.savez(path, **arrays(**changes))  # type: ignore[arg-type]
    with pytest.raises(DataError, match=text):
        open_data(section(path))


def test_archives_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    with pytest.raises(DataError, match=rf"^{path} cannot be read: No such file or directory\.$"):
        open_data(section(path))
    path.write_bytes(b"PK\x03\x04 and nothing more")
    with pytest.raises(DataError, match=rf"^{path} is broken: "):
        open_data(section(path))


def test_a_factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_data.py").write_text(
        "import torch\n"
        "from nibblecore.qat.training import DataSet, TensorSplit\n"
        "class Lazy:\n"
        "    def __init__(self, channels): self.channels = channels\n"
        "    def __len__(self): return 4\n"
        "    def batch(self, indices):\n"
        "        images = torch.rand(len(indices), self.channels, 2, 2, generator=torch.Generator().manual_seed(1))\n"
        "        return images, indices % 2\n"
        "def good(): return DataSet(train=Lazy(3), test=Lazy(3), classes=2)\n"
        "def labels(): return DataSet(train=Lazy(3), test=Lazy(3), classes=1)\n"
        "def number(): return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_data", raising=False)
    assert isinstance(open_data(section("my_data:good")), DataSet)
    for name, text in (
        ("my_data:labels", r"^Of the train images of my_data:labels, image 1 has the label 1; classes are 0\.\.0\."),
        ("my_data:number", r"^my_data:number returned int, not a nibblecore\.qat\.training\.DataSet\.$"),
        ("my_data:none", r"^Module my_data has no none for the data set my_data:none\.$"),
        (
            "no_data:none",
            r"^There is no module no_data for the data set no_data:none\.\nRun in the folder that contains",
        ),
    ):
        with pytest.raises(DataError, match=text):
            open_data(section(name))


def test_noisy_digits_are_always_the_same() -> None:
    first, second = digits.load_noisy(), digits.load_noisy()
    assert np.array_equal(first.test_images, second.test_images)
    assert first.test_images.shape == (360 * digits.NOISY_COPIES, 1, 8, 8)
    assert (first.test_images.min(), first.test_images.max()) == (0, 1)
    assert np.array_equal(first.test_labels[:360], first.test_labels[360:720])
    assert not np.array_equal(first.test_images[:360], first.test_images[360:720])
    assert np.array_equal(first.train_images, digits.load().train_images)


def test_augmentation() -> None:
    images = torch.zeros(200, 3, 5, 4)
    images[:, 0, 2, 0], images[:, 2, 2, 0] = 1, 0.5
    data = DataSet(train=TensorSplit(images, torch.zeros(200)), test=TensorSplit(images, torch.zeros(200)), classes=1)
    generator = torch.Generator().manual_seed(0)
    assert augment(images, section("x"), data, generator) is images
    mirrored = augment(images, section("x", flip=True), data, generator)
    left, right = mirrored[:, 0, 2, 0].bool(), mirrored[:, 0, 2, 3].bool()
    assert bool((left ^ right).all())
    assert 60 < int(left.sum()) < 140
    moved = augment(images, section("x", shift=2), data, generator)
    assert set(moved[:, 0].nonzero()[:, 1].tolist()) == {0, 1, 2, 3, 4}
    # All channels of an image move together.
    assert torch.equal(moved[:, 2], moved[:, 0] / 2)
    noisy = augment(images, section("x", noise=0.1), data, generator)
    assert (float(noisy.min()), float(noisy.max())) == (0, 1)
    assert float(noisy[:, 2, 2, 0].std()) == pytest.approx(0.1, rel=0.2)
