"""Data sets of trainings: opened by name, checked before anything is trained."""

import dataclasses
import importlib
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import torch
from torch import Tensor

from ...errors import DataError
from ..recipes import digits
from .recipe import DataSection

IMAGE_SUFFIXES: Final = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
MEMORY_LIMIT: Final = 4 << 30
"""Bytes that the decoded images of a folder may take."""
SPLIT_SEED: Final = 0


class Split(Protocol):
    """Images and labels, by index."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images ``(N, C, H, W)`` as float32 within the data set's range, and labels ``(N,)`` as int64."""
        ...


class TensorSplit:
    """Images and labels in memory.

    Parameters
    ----------
    images : Tensor
        ``(N, C, H, W)``: floating point, or uint8, which stands for ``value / 255``.
    labels : Tensor
        ``(N,)``, integers.
    names : tuple of str, optional
        What errors call the images; files, for example.
    """

    def __init__(self, images: Tensor, labels: Tensor, names: tuple[str, ...] | None = None) -> None:
        self.images, self.labels, self.names = images, labels, names

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        images = self.images[indices]
        return images.float() / 255 if images.dtype == torch.uint8 else images.float(), self.labels[indices].long()

    def name(self, index: int) -> str:
        return f"image {index}" if self.names is None else self.names[index]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSet:
    """What a training reads: what ``package.module:factory`` of a recipe's ``data.name`` returns.

    Parameters
    ----------
    train, test : Split
    classes : int
        Labels are 0..classes - 1.
    input_range : tuple[float, float]
        Of the images' values, with 0 in it; fixes the grid of the network's input.
    """

    train: Split
    test: Split
    classes: int
    input_range: tuple[float, float] = (0.0, 1.0)


def open_data(section: DataSection) -> DataSet:
    """The data set that a recipe names, checked.

    Raises
    ------
    DataError
        A set without images, an image that cannot be read, has another shape, values that are not finite or outside of
        the range, or only one value, and labels that are no class.
    """
    name = section.name
    if name in ("digits", "digits-noisy"):
        arrays = digits.load() if name == "digits" else digits.load_noisy()
        data = DataSet(
            train=TensorSplit(torch.from_numpy(arrays.train_images), torch.from_numpy(arrays.train_labels)),
            test=TensorSplit(torch.from_numpy(arrays.test_images), torch.from_numpy(arrays.test_labels)),
            classes=10,
        )
    elif name.endswith(".npz"):
        data = _npz(Path(name))
    elif ":" in name and not Path(name).exists():
        data = _factory(name)
    else:
        data = _folder(Path(name), section)
    for which, split in (("train", data.train), ("test", data.test)):
        _check(split, which, data, section)
    if section.limit:
        data = dataclasses.replace(data, train=_first(data.train, section.limit))
    if len(data.train) < section.batch:
        raise DataError(
            f"{name} has {len(data.train)} training images, fewer than a batch of {section.batch}.",
            hint="Set data.batch to a smaller number.",
        )
    return data


def augment(images: Tensor, section: DataSection, data: DataSet, generator: torch.Generator) -> Tensor:
    """Training images as the recipe changes them: moved, mirrored, with noise."""
    if section.shift:
        images = digits.shift_randomly(images, generator, section.shift)
    if section.flip:
        mirrored = torch.rand(len(images), generator=generator) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    if section.noise:
        images = digits.add_noise(images, section.noise, generator, *data.input_range)
    return images


class _Subset:
    def __init__(self, split: Split, count: int) -> None:
        self.split, self.count = split, count

    def __len__(self) -> int:
        return self.count

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self.split.batch(indices)


def _first(split: Split, count: int) -> Split:
    return split if count >= len(split) else _Subset(split, count)


def _check(split: Split, which: str, data: DataSet, section: DataSection) -> None:
    where = f"the {which} images of {section.name}"
    if not len(split):
        raise DataError(f"There are no images among {where}.")
    name = split.name if isinstance(split, TensorSplit) else "image {}".format
    shape: tuple[int, ...] | None = None
    # Splits that read files are checked by their first batch here; each later batch is checked when it is used.
    count = len(split) if isinstance(split, TensorSplit) else min(len(split), section.batch)
    for indices in torch.arange(count).split(256):
        images, labels = split.batch(indices)
        shape = shape or tuple(images.shape[1:])
        check_batch(images, labels, data, [name(int(i)) for i in indices], where, section.allow_constant)
        if tuple(images.shape[1:]) != shape:
            raise DataError(
                f"Of {where}, {name(int(indices[0]))} has the shape {tuple(images.shape[1:])}, not {shape}."
            )


def check_batch(
    images: Tensor, labels: Tensor, data: DataSet, names: list[str], where: str, allow_constant: bool
) -> None:
    """Raise :class:`DataError` for the first image or label of a batch that cannot be trained on."""
    if images.ndim != 4 or not images.is_floating_point():
        raise DataError(
            f"A batch of {where} is {images.dtype} of shape {tuple(images.shape)}; it must be floating point, "
            "(N, C, H, W)."
        )
    if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        raise DataError(
            f"The labels of {where} are {labels.dtype} of shape {tuple(labels.shape)}; they must be int64, one for "
            f"each of {len(images)} images."
        )
    low, high = data.input_range
    flat = images.flatten(1)
    least, most = flat.amin(1), flat.amax(1)
    tests = (
        (~flat.isfinite().all(1), lambda k: "has values that are not finite", "Leave it out."),
        (
            (least < low) | (most > high),
            lambda k: f"has values in {float(least[k]):g}..{float(most[k]):g}, outside of {low:g}..{high:g}",
            "Scale the values, or give the data set its input_range.",
        ),
        (
            (least == most) & (not allow_constant),
            lambda k: f"is empty: all of its values are {float(least[k]):g}",
            "Leave it out, or set data.allow_constant = true.",
        ),
        (
            (labels < 0) | (labels >= data.classes),
            lambda k: f"has the label {int(labels[k])}; classes are 0..{data.classes - 1}",
            "Correct the label, or the number of classes.",
        ),
    )
    for bad, text, hint in tests:
        if bool(bad.any()):
            first = int(bad.nonzero()[0])
            more = f" (and {int(bad.sum()) - 1} more in its batch)" if int(bad.sum()) > 1 else ""
            raise DataError(f"Of {where}, {names[first]} {text(first)}{more}.", hint=hint)


def _factory(name: str) -> DataSet:
    module_name, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), function)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module exists and lacks something itself
        raise DataError(
            f"There is no module {error.name} for the data set {name}.",
            hint="Run in the folder that contains it, or install its package.",
        ) from error
    except AttributeError as error:
        raise DataError(f"Module {module_name} has no {function} for the data set {name}.") from error
    data = found()
    if not isinstance(data, DataSet):
        raise DataError(f"{name} returned {type(data).__name__}, not a nibblecore.qat.training.DataSet.")
    return data


_ARRAYS: Final = ("train_images", "train_labels", "test_images", "test_labels")


def _npz(path: Path) -> DataSet:
    try:
        # Opened here, as numpy leaves files open that are broken.
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            if missing := [key for key in _ARRAYS if key not in file]:
                raise DataError(f"{path} has no array {missing[0]!r}; it must have {', '.join(_ARRAYS)}.")
            arrays = {key: file[key] for key in _ARRAYS}
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    except DataError:
        raise
    except Exception as error:  # numpy and zipfile raise a class of their own for each way in which a file is broken
        raise DataError(f"{path} is broken: {error}.") from error
    images = {}
    for key in ("train_images", "test_images"):
        value = arrays[key]
        if value.ndim == 3:
            value = value[:, None]
        if value.ndim != 4 or (value.dtype != np.uint8 and value.dtype.kind != "f"):
            raise DataError(
                f"{path}: {key} is {value.dtype} of shape {value.shape}; it must be uint8 or floating point, (N, H, W) "
                "or (N, C, H, W)."
            )
        images[key] = torch.from_numpy(value)
    labels = {}
    for key in ("train_labels", "test_labels"):
        value = arrays[key]
        if (
            value.ndim != 1
            or value.dtype.kind not in "iu"
            or len(value) != len(arrays[key.replace("labels", "images")])
        ):
            raise DataError(
                f"{path}: {key} is {value.dtype} of shape {value.shape}; it must be integers, one for each image."
            )
        labels[key] = torch.from_numpy(value.astype(np.int64))
    return DataSet(
        train=TensorSplit(images["train_images"], labels["train_labels"]),
        test=TensorSplit(images["test_images"], labels["test_labels"]),
        classes=_classes(labels["train_labels"]),
    )


def _classes(labels: Tensor) -> int:
    return int(labels.max()) + 1 if len(labels) else 0


def _folder(path: Path, section: DataSection) -> DataSet:
    """Images in a subfolder per class, below ``train`` and ``test`` (or ``val``), or all in one, to be split."""
    if not path.is_dir():
        raise DataError(
            f"There is no data set {section.name}: it is no folder, and neither digits nor digits-noisy.",
            hint="Give a folder with a subfolder of images per class, an .npz file, or package.module:factory.",
        )
    test = next((path / n for n in ("test", "val") if (path / n).is_dir()), None)
    if (path / "train").is_dir() and test is not None:
        classes = _subfolders(path / "train")
        if unknown := [c for c in _subfolders(test) if c not in classes]:
            raise DataError(f"{test / unknown[0]} is a class that {path / 'train'} does not have.")
        return DataSet(
            train=_read_images(_files(path / "train", classes), section),
            test=_read_images(_files(test, classes), section),
            classes=len(classes),
        )
    classes = _subfolders(path)
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    parts: dict[str, list[tuple[Path, int]]] = {"train": [], "test": []}
    for label, name in enumerate(classes):
        files = [f for f, _ in _files(path, [name])]
        order = torch.randperm(len(files), generator=generator).tolist()
        held_out = set(order[: max(1, round(section.test_share * len(files)))])
        for k, file in enumerate(files):
            parts["test" if k in held_out else "train"].append((file, label))
    return DataSet(
        train=_read_images(parts["train"], section), test=_read_images(parts["test"], section), classes=len(classes)
    )


def _subfolders(path: Path) -> list[str]:
    names = sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise DataError(f"{path} has no subfolders; it must have one of images for each class.")
    return names


def _files(path: Path, classes: list[str]) -> list[tuple[Path, int]]:
    found = []
    for label, name in enumerate(classes):
        if not (path / name).is_dir():
            continue  # a class that has only training images
        files = sorted(p for p in (path / name).iterdir() if p.suffix.lower() in (*IMAGE_SUFFIXES, ".npy"))
        if not files:
            raise DataError(f"{path / name} has no images; known are {', '.join(IMAGE_SUFFIXES)} and .npy.")
        found += [(file, label) for file in files]
    return found


def _read_images(files: list[tuple[Path, int]], section: DataSection) -> TensorSplit:
    images: list[Tensor] = []
    for file, _ in files:
        image = _read_array(file) if file.suffix.lower() == ".npy" else _read_image(file, section)
        if images and (image.shape, image.dtype) != (images[0].shape, images[0].dtype):
            raise DataError(
                f"{file} is {_kind(image)}, and {files[0][0]} is {_kind(images[0])}.",
                hint="Set data.image_size to resize all images, and data.channels to 1 or 3.",
            )
        images.append(image)
        if images[0].numel() * len(files) > MEMORY_LIMIT:
            raise DataError(
                f"{len(files)} images of {images[0].numel()} values are more than {MEMORY_LIMIT >> 30} GiB.",
                hint="Give data.name a package.module:factory that reads them when they are needed.",
            )
    labels = torch.tensor([label for _, label in files], dtype=torch.int64)
    stacked = torch.stack(images) if images else torch.zeros(0, 1, 1, 1)
    return TensorSplit(stacked, labels, tuple(str(f) for f, _ in files))


def _kind(image: Tensor) -> str:
    return f"{str(image.dtype).removeprefix('torch.')} of shape {tuple(image.shape)}"


def _read_image(file: Path, section: DataSection) -> Tensor:
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(
            "Reading image files needs Pillow, which is not installed.", hint="Run: pip install 'nibblecore[train]'"
        ) from error
    size = section.image_size
    try:
        with Image.open(file) as opened:
            image = opened.convert("L" if section.channels == 1 else "RGB")
            if size:
                image = image.resize((size, size), Image.Resampling.BILINEAR)
            values = np.asarray(image, dtype=np.uint8)
    except Exception as error:  # Pillow raises whatever a decoder does
        raise DataError(f"{file} is a broken image, or none: {error}.", hint="Replace it, or leave it out.") from error
    return torch.from_numpy(values.reshape(*values.shape[:2], -1).transpose(2, 0, 1).copy())


def _read_array(file: Path) -> Tensor:
    try:
        with file.open("rb") as opened:
            value: Any = np.load(opened, allow_pickle=False)
    except Exception as error:  # as above
        raise DataError(f"{file} is a broken array: {error}.", hint="Replace it, or leave it out.") from error
    if value.ndim == 2:
        value = value[None]
    if value.ndim != 3 or (value.dtype != np.uint8 and value.dtype.kind != "f"):
        raise DataError(
            f"{file} is {value.dtype} of shape {value.shape}; it must be uint8 or floating point, (H, W) or (C, H, W)."
        )
    return torch.from_numpy(value)
