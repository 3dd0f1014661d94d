"""Image classification data held in memory as bytes: loading, splits, label noise, augmentation, batches.

``seed`` decides which images train (split and subset), their order, and which labels are replaced; each use has its own
random stream. Batches and augmentation draw from the generators passed in. The global random state is never used.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from bnsharp.checks import suggest, whole
from bnsharp.errors import InputError
from bnsharp.ordering import stratified_order

Pair = tuple[Tensor, Tensor]
"""Images and labels: uint8 ``[N, C, H, W]`` (float32 once normalised) and int64 ``[N]``."""
RawData = tuple[Pair, Pair | None, tuple[str, ...]]
"""As read: training pair, test pair, names of the classes; without a test pair, the first is a pool still to split."""

_SPLIT, _TEST_ORDER, _NOISE = range(3)  # random streams: one seed serves all, without correlation


@dataclass(frozen=True)
class Augmentation:
    """Random flips and shifts of training images (He et al. 2015, arXiv:1512.03385, section 4.2).

    Attributes:
        flip: mirror each image left to right with probability 1/2.
        crop: zero padding in pixels on every side, before a crop of the original size at a uniformly random place.
    """

    flip: bool = False
    crop: int = 0

    def __post_init__(self) -> None:
        whole("crop", self.crop, least=0)


@dataclass(frozen=True, eq=False)
class ImageData:
    """A training and a test set in memory.

    Attributes:
        name: the data set's or folder's name.
        train_images, test_images: uint8 ``[N, C, H, W]``, 0 to 255; the first n of either are nearly stratified.
        train_labels, test_labels: int64 ``[N]``, indices into ``classes``.
        classes: names of the classes.
        mean, std: float32 ``[C]``, of the training images in units of x/255; std is 1 for a constant channel.
        augmentation: what :meth:`train_batch` does to training images.
        noisy: bool ``[N]``, training examples whose label was replaced at random; None if none ever was.

    Raises:
        InputError: a label that is no index into ``classes``.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    mean: Tensor
    std: Tensor
    augmentation: Augmentation = Augmentation()
    noisy: Tensor | None = None

    def __post_init__(self) -> None:
        for part, labels in (("training", self.train_labels), ("test", self.test_labels)):
            if labels.is_meta or not len(labels):  # without values
                continue
            low, high = (int(value) for value in labels.aminmax())
            if low < 0 or high >= len(self.classes):
                raise InputError(
                    f"{self.name} has {part} labels from {low} to {high} and {len(self.classes)} classes; expected "
                    f"labels from 0 to {len(self.classes) - 1}: check the data's files"
                )

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of one image."""
        _, channels, height, width = self.train_images.shape
        return channels, height, width

    def to(self, device: torch.device | str) -> ImageData:
        """The same data on ``device``."""
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    def normalize(self, images: Tensor) -> Tensor:
        """``(x/255 − mean) / std`` per channel: uint8 ``[n, C, H, W]`` to float32 ``[n, C, H, W]``."""
        mean, std = (rearrange(v, "c -> c 1 1") for v in (self.mean, self.std))
        return (images.to(torch.float32) / 255 - mean) / std

    def augment(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        """Copies of ``images [n, C, H, W]``, each with its own flip and shift; they need a generator."""
        pad, flips = self.augmentation.crop, self.augmentation.flip
        if not pad and not flips:
            return images
        if generator is None:
            raise InputError("augmentation got generator=None; expected a torch.Generator: pass a seeded one")
        n, channels, height, width = images.shape
        draws = torch.empty(3, n, 1, dtype=torch.int64, device=generator.device)
        draws[:2].random_(2 * pad + 1, generator=generator)
        draws[2].random_(1 + flips, generator=generator)
        top, left, flip = draws.to(images.device)
        rows = torch.arange(height, device=images.device) + top  # [n, H]
        columns = torch.arange(width, device=images.device) + left  # [n, W]
        columns = torch.where(flip == 1, columns.flip(1), columns)
        pixels = rows[:, :, None] * (width + 2 * pad) + columns[:, None, :]  # [n, H, W], places in the padded image
        padded = rearrange(F.pad(images, (pad,) * 4), "n c h w -> n c (h w)")
        taken = padded.gather(2, rearrange(pixels, "n h w -> n 1 (h w)").expand(-1, channels, -1))
        return rearrange(taken, "n c (h w) -> n c h w", h=height)

    def train_batch(self, indices: Tensor, generator: torch.Generator | None = None) -> Pair:
        """Augmented and normalised training examples at ``indices [n]``; only augmentation needs a generator."""
        indices = indices.to(self.train_images.device)
        return self.normalize(self.augment(self.train_images[indices], generator)), self.train_labels[indices]

    def train_set(self, n: int | None = None) -> Pair:
        """The first ``n`` (default all) training examples, normalised, not augmented, labels as they are trained on."""
        return self._first(n, self.train_images, self.train_labels)

    def test_set(self, n: int | None = None) -> Pair:
        """The first ``n`` (default all) test examples, normalised."""
        return self._first(n, self.test_images, self.test_labels)

    def _first(self, n: int | None, images: Tensor, labels: Tensor) -> Pair:
        n = len(labels) if n is None else whole("n", n)
        if n > len(labels):
            raise InputError(f"the first n={n} examples of {self.name}; expected at most {len(labels)}: lower n")
        return self.normalize(images[:n]), labels[:n]

    def with_label_noise(self, fraction: float, seed: int) -> ImageData:
        """Training labels *replaced at random* for exactly ``round(fraction · N)`` examples.

        A replaced label is uniform over all K classes, so it stays right with probability 1/K (Zhang et al. 2017,
        arXiv:1611.03530). For one seed, a smaller fraction changes a part of what a larger one changes. ``noisy`` marks
        what was replaced, now or before. Raises :class:`InputError` unless 0 ≤ fraction ≤ 1.
        """
        _require_fraction(fraction)
        n, device = len(self.train_labels), self.train_labels.device
        generator = _stream(seed, _NOISE)
        chosen = (torch.randperm(n, generator=generator) < round(fraction * n)).to(device)
        labels = torch.randint(len(self.classes), (n,), generator=generator).to(device)
        noisy = chosen if self.noisy is None else self.noisy | chosen
        return replace(self, train_labels=torch.where(chosen, labels, self.train_labels), noisy=noisy)


@dataclass(frozen=True)
class DatasetSpec:
    """A registered data set: ``loader(root, download)`` reads it, ``train_size`` is a pool's default split."""

    loader: Callable[[Path, bool], RawData]
    summary: str
    source: str
    augmentation: Augmentation
    train_size: int | None = None


def load(
    name_or_folder: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    augment: bool = False,
    label_noise: float = 0.0,
    seed: int = 0,
    train_size: int | None = None,
    validation: float = 0.0,
    image_size: int | tuple[int, int] | None = None,
    download: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> ImageData:
    """A data set by name, or an image folder ``train/<class>/*`` and ``test/<class>/*`` by path.

    Args:
        name_or_folder: a key of :data:`DATASETS`, or a path (``./digits`` for a folder that has such a name).
        root: where named sets are kept; default the environment's ``BNSHARP_DATA``, else ``~/.cache/bnsharp``.
        augment: use the standard augmentation; for a folder flips, and crops with padding H // 8.
        label_noise: fraction of training labels to replace at random, see :meth:`ImageData.with_label_noise`.
        seed: decides split, subset, order of the training images and label noise. Which test images come first does
            not depend on it, unless a pool is split.
        train_size: keep a stratified subset of the training images; where a pool is split, the rest is for testing.
        validation: this fraction of the training images (after ``train_size``), nearly stratified, takes the test
            images' place and is not trained on: to choose settings without a look at the test set. Their labels stay.
        image_size: resize to ``(H, W)`` or a square, in pixels; bilinear with antialiasing.
        download: fetch a named set that is missing.
        progress: called with the number of images decoded so far and their total, after each image of a folder.

    Raises:
        InputError: unknown name, data that are missing, unreadable or of unequal size, a number out of range.
    """
    _require_fraction(label_noise)
    whole("seed", seed, least=0)
    size, name = _image_size(image_size), os.fspath(name_or_folder)
    if train_size is not None:
        whole("train_size", train_size)
    if (spec := DATASETS.get(name)) is not None:
        home = Path(root or os.environ.get("BNSHARP_DATA") or "~/.cache/bnsharp").expanduser()
        (pool, test, classes), augmentation, default = spec.loader(home, download), spec.augmentation, spec.train_size
    else:
        folder = Path(name).expanduser()
        (pool, test, classes), name = _read_folder(folder, size, progress), folder.resolve().name
        augmentation, default = Augmentation(flip=True, crop=pool[0].shape[2] // 8), None

    if not len(pool[1]) or (test is not None and not len(test[1])):
        raise InputError(f"{name} holds no images; expected at least one for training and one for testing")
    order = stratified_order(pool[1], _stream(seed, _SPLIT))
    most = len(order) - (test is None)
    kept = train_size or default or most
    if kept > most:
        raise InputError(f"train_size={kept} of {name}; expected at most {most}: lower train_size")
    held = _held_out(validation, kept)
    later = order[kept:] if test is None else stratified_order(test[1], _stream(0, _TEST_ORDER))
    if held:
        test, later = pool, order[kept - held : kept]
    train = _resize(pool[0][order[: kept - held]], size), pool[1][order[: kept - held]]
    test = _resize((test or pool)[0][later], size), (test or pool)[1][later]
    mean, std = _moments(train[0])
    data = ImageData(name, *train, *test, classes, mean, std, augmentation if augment else Augmentation())
    return data.with_label_noise(label_noise, seed) if label_noise else data


def _held_out(fraction: float, n: int) -> int:
    """How many of n training images are held out."""
    if not isinstance(fraction, int | float) or isinstance(fraction, bool) or not 0 <= fraction < 1:
        raise InputError(f"validation={fraction!r}; expected a fraction of the training images from 0 to below 1")
    held = round(fraction * n)
    if fraction and not 0 < held < n:
        raise InputError(f"validation={fraction!r} of {n} training images: {n - held} for training, {held} for "
                         "validation; expected at least one of each")
    return held


def _load_digits(root: Path, download: bool) -> RawData:
    from sklearn.datasets import load_digits

    digits = load_digits()  # images float64 [1797, 8, 8], values 0 to 16
    images = torch.from_numpy(np.round(digits.images * (255 / 16)).astype(np.uint8))
    labels = torch.from_numpy(digits.target.astype(np.int64))
    return (rearrange(images, "n h w -> n 1 h w"), labels), None, tuple(map(str, digits.target_names))


def _torchvision(
    dataset: str, layout: str, root: Path, download: bool, labels: str = "targets", splits: Any = (True, False)
) -> RawData:
    """``torchvision.datasets.<dataset>(root, split)``, with ``data`` of axes ``layout`` and an attribute ``labels``."""
    import torchvision

    make = getattr(torchvision.datasets, dataset)
    try:
        parts = [make(root, split, download=download) for split in splits]
    except Exception as error:  # no network, no permission, a file missing or damaged: it can fail in any way
        raise InputError(
            f"{dataset} cannot be read from {root} ({' '.join(str(error).split())}); expected its files there: "
            "allow download on a machine with network, or let root or BNSHARP_DATA name the folder that has them"
        ) from error
    axes = f"{layout} -> n {'c' if 'c' in layout else '1'} h w"
    train, test = (
        (rearrange(torch.as_tensor(part.data), axes), torch.as_tensor(getattr(part, labels), dtype=torch.int64))
        for part in parts
    )
    return train, test, tuple(map(str, getattr(parts[0], "classes", range(10))))


_CIFAR = ("Krizhevsky 2009", Augmentation(flip=True, crop=4))
_SVHN = partial(_torchvision, "SVHN", "n c h w", labels="labels", splits=("train", "test"))
DATASETS = {
    "digits": DatasetSpec(_load_digits, "8×8 digits, bundled", "Alpaydin & Kaynak 1998", Augmentation(crop=1), 800),
    "cifar10": DatasetSpec(partial(_torchvision, "CIFAR10", "n h w c"), "32×32 photographs, 10 classes", *_CIFAR),
    "cifar100": DatasetSpec(partial(_torchvision, "CIFAR100", "n h w c"), "32×32 photographs, 100 classes", *_CIFAR),
    "mnist": DatasetSpec(
        partial(_torchvision, "MNIST", "n h w"), "28×28 gray digits", "LeCun et al. 1998", Augmentation(crop=2)
    ),
    "fashion-mnist": DatasetSpec(
        partial(_torchvision, "FashionMNIST", "n h w"), "28×28 gray clothes", "Xiao et al. 2017", Augmentation(True, 2)
    ),
    "svhn": DatasetSpec(_SVHN, "32×32 house-number digits", "Netzer et al. 2011", Augmentation(crop=4)),
}
"""The data sets that :func:`load` knows by name."""


def _read_folder(root: Path, size: tuple[int, int] | None, progress: Callable[[int, int], None] | None) -> RawData:
    """Decode ``root/train/<class>/*`` and ``root/test/<class>/*``: gray if every image is, else RGB."""
    classes = _class_names(root)
    files = [[_entries(root / split / name, Path.is_file) for name in classes] for split in ("train", "test")]
    paths = [path for split in files for group in split for path in group]
    images: list[np.ndarray] = []
    for path in paths:
        images.append(_decode(path, size))
        shape, first = images[-1].shape[:2], images[0].shape[:2]
        if shape != first:
            raise InputError(f"{path} is of size {shape}, {paths[0]} of {first}; expected one size: pass image_size")
        if progress is not None:
            progress(len(images), len(paths))
    channels = max(image.shape[2] for image in images)
    stacked = torch.from_numpy(np.stack([np.broadcast_to(image, (*first, channels)) for image in images]))
    labels = [torch.tensor([i for i, group in enumerate(split) for _ in group]) for split in files]
    train, test = torch.split(rearrange(stacked, "n h w c -> n c h w"), [len(part) for part in labels])
    return (train, labels[0]), (test, labels[1]), classes


def _class_names(root: Path) -> tuple[str, ...]:
    if not root.is_dir():
        raise InputError(
            f"'{root}' is neither a data set nor a folder; expected one of {', '.join(DATASETS)}, or a folder with "
            f"train/<class>/ and test/<class>/{suggest(root, DATASETS)}"
        )
    train, test = ({path.name for path in _entries(root / split, Path.is_dir)} for split in ("train", "test"))
    if train != test:
        raise InputError(
            f"{root} has classes only in train/: {sorted(train - test)}, only in test/: {sorted(test - train)}; "
            "expected the same in both: add or remove class folders"
        )
    return tuple(sorted(train))


def _entries(folder: Path, kind: Callable[[Path], bool]) -> list[Path]:
    """What is in ``folder`` of that kind, sorted, without hidden names: at least one."""
    found = sorted(path for path in folder.glob("[!.]*") if kind(path))
    if not found:
        raise InputError(
            f"{folder} is empty or missing; expected train/<class>/* and test/<class>/*: fill or remove it"
        )
    return found


def _decode(path: Path, size: tuple[int, int] | None) -> np.ndarray:
    """One image file as uint8 ``[H, W, 1]`` (gray) or ``[H, W, 3]``."""
    try:
        with Image.open(path) as file:
            mode = file.mode
            image = file.convert("L" if mode in ("1", "L", "LA") else "RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is not a readable image; expected e.g. PNG or JPEG: replace or remove it") from error
    if mode.startswith(("I", "F")):
        raise InputError(f"{path} has pixels of mode {mode}; expected 8 bits per channel: convert it")
    return np.atleast_3d(np.array(image if size is None else image.resize(size[::-1], Image.Resampling.BILINEAR)))


def _resize(images: Tensor, size: tuple[int, int] | None) -> Tensor:
    """uint8 ``[N, C, H, W]`` resized to ``size``, contiguous."""
    if size is None or images.shape[2:] == size:
        return images.contiguous()
    return F.interpolate(images, size, mode="bilinear", antialias=True).contiguous()


def _moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (1 if zero) per channel, in units of x/255, float32 ``[C]``, by histogram."""
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]).double()
    weights, levels = counts / counts.sum(1, keepdim=True), torch.arange(256).double() / 255  # [C, 256], [256]
    mean = weights @ levels
    std = (weights * (levels - mean[:, None]) ** 2).sum(1).sqrt()
    return mean.float(), torch.where((counts > 0).sum(1) > 1, std, 1.0).float()


def _stream(seed: int, stream: int) -> torch.Generator:
    whole("seed", seed, least=0)
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, stream)).generate_state(1, np.uint64)[0]))


def _require_fraction(value: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:  # NaN too
        raise InputError(f"label noise {value!r}; expected a fraction between 0 and 1: pass e.g. 0.2 for 20%")


def _image_size(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    height, width = size if isinstance(size, tuple | list) and len(size) == 2 else (size, size)
    return whole("image_size", height), whole("image_size", width)
