"""Laws of the data module: splits, noise, augmentation against a slow oracle, folders, clear errors."""

from __future__ import annotations

import itertools
import re
import struct
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from bnsharp.data import DATASETS, Augmentation, ImageData, load
from bnsharp.errors import InputError
from bnsharp.ordering import epoch_indices, stratified_order

TENSORS = ("train_images", "train_labels", "test_images", "test_labels", "mean", "std")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(n: int, shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    return torch.randint(256, (n, *shape), dtype=torch.uint8, generator=generator(seed))


def synthetic(images: Tensor, classes: int = 3, flip: bool = False, crop: int = 0) -> ImageData:
    labels, names = torch.arange(len(images)) % classes, tuple("abcdefghij"[:classes])
    zero, one = torch.zeros(images.shape[1]), torch.ones(images.shape[1])
    return ImageData("synthetic", images, labels, images, labels, names, zero, one, Augmentation(flip, crop))


def rows(images: Tensor, labels: Tensor) -> list[bytes]:
    """Every example as bytes, sorted: equal lists mean equal multisets."""
    return sorted(x.numpy().tobytes() + bytes([y]) for x, y in zip(images, labels, strict=True))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of PNG images, 4×6 RGB, whose first pixel holds the class and a number."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 5), ("test", 3)):
        for label, name in enumerate(("cat", "ant", "bee")):
            for i in range(count):
                pixels = rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)
                pixels[0, 0] = (label, i, split == "test")
                write(tmp_path / split / name / f"{i}.png", pixels)
    return tmp_path


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@given(counts=st.lists(st.integers(1, 12), min_size=1, max_size=6), seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_stratified_order_is_sainte_laguës_apportionment(counts, seed):
    """Oracle: seats are given one by one to a class c with the smallest (2 a_c + 1) / n_c."""
    labels = torch.cat([torch.full((n,), c) for c, n in enumerate(counts)])
    order = stratified_order(labels, generator(seed))
    assert sorted(order.tolist()) == list(range(len(labels)))
    taken = [0] * len(counts)
    for label in labels[order].tolist():
        left = [d for d in range(len(counts)) if taken[d] < counts[d]]
        assert all((2 * taken[label] + 1) * counts[d] <= (2 * taken[d] + 1) * counts[label] for d in left)
        taken[label] += 1


@pytest.mark.parametrize("train_size", [None, 100, 1796])
def test_digits_split_is_a_stratified_partition(train_size):
    data = load("digits", train_size=train_size, seed=3)
    kept = train_size or 800
    raw = load_digits()
    images = torch.from_numpy(raw.images * 255 / 16).round().to(torch.uint8)[:, None]
    everything = rows(images, torch.from_numpy(raw.target))
    assert (data.input_shape, len(data.train_labels), len(data.test_labels)) == ((1, 8, 8), kept, 1797 - kept)
    together = torch.cat([data.train_images, data.test_images]), torch.cat([data.train_labels, data.test_labels])
    assert rows(*together) == everything
    expected = torch.from_numpy(np.bincount(raw.target)) * kept / 1797
    assert (torch.bincount(data.train_labels) - expected).abs().max() <= 1
    assert (data.train_images.max(), data.classes) == (255, tuple("0123456789"))


def test_seed_decides_split_and_noise_and_the_global_state_is_untouched():
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    a, b, c = (load("digits", seed=s, label_noise=0.3) for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert all(torch.equal(getattr(a, t), getattr(b, t)) for t in (*TENSORS, "noisy"))
    assert not torch.equal(a.train_images, c.train_images)
    assert not torch.equal(a.noisy, c.noisy)


def test_smaller_subsets_are_parts_of_larger_ones_whatever_order_files_are_listed_in(folder, monkeypatch):
    small, large = (load("digits", train_size=n, seed=1) for n in (50, 70))
    assert torch.equal(small.train_images, large.train_images[:50])
    few, listing = load(folder, train_size=6), Path.glob
    monkeypatch.setattr(Path, "glob", lambda *args: sorted(listing(*args), reverse=True))
    assert torch.equal(few.train_images, load(folder).train_images[:6])
    assert torch.equal(few.test_images, load(folder, seed=9).test_images)
    assert torch.bincount(few.train_labels).tolist() == [2, 2, 2]


@pytest.mark.parametrize("pooled", [True, False], ids=["a pool", "a folder"])
def test_validation_images_are_held_out_of_the_training_images(folder, pooled):
    source, n, held = ("digits", 800, 200) if pooled else (folder, 15, 4)
    whole, data = load(source, seed=2), load(source, seed=2, validation=0.25)
    assert (len(data.train_labels), len(data.test_labels)) == (n - held, held)
    assert torch.equal(torch.cat([data.train_images, data.test_images]), whole.train_images)
    assert torch.equal(torch.cat([data.train_labels, data.test_labels]), whole.train_labels)
    share = torch.bincount(whole.train_labels).double() * held / n
    assert (torch.bincount(data.test_labels, minlength=len(data.classes)) - share).abs().max() <= 1
    assert not torch.equal(data.mean, whole.mean)  # of the images that are trained on


def test_labels_of_validation_images_are_not_replaced():
    clean, noisy = load("digits", validation=0.5), load("digits", validation=0.5, label_noise=1.0)
    assert torch.equal(clean.test_labels, noisy.test_labels)
    assert not torch.equal(clean.train_labels, noisy.train_labels)


def test_normalised_training_set_has_mean_0_and_std_1(folder):
    for data in (load("digits"), load(folder)):
        x, y = data.train_set()
        assert x.dtype == torch.float32
        assert torch.equal(y, data.train_labels)
        mean, std = x.double().mean((0, 2, 3)), x.double().std((0, 2, 3), correction=0)
        assert torch.allclose(mean, torch.zeros_like(mean), atol=1e-6)
        assert torch.allclose(std, torch.ones_like(std), atol=1e-6)


def test_constant_channel_is_normalised_to_zero(tmp_path):
    for split, label in itertools.product(("train", "test"), "ab"):
        write(tmp_path / split / label / "x.png", np.full((4, 4), 77, dtype=np.uint8))
    data = load(tmp_path)
    assert data.std.tolist() == [1.0]
    assert data.train_set()[0].abs().max() < 1e-6


def test_first_examples_are_unaugmented_and_bounded():
    data = load("digits", augment=True)
    x, y = data.train_set(7)
    assert torch.equal(x, data.normalize(data.train_images[:7]))
    assert torch.equal(y, data.train_labels[:7])
    x, y = data.test_set()
    assert torch.equal(x, data.normalize(data.test_images))
    assert len(y) == 997


def test_train_batch_is_augmentation_then_normalisation():
    data = load("digits", augment=True)
    indices = torch.tensor([5, 0, 5, 799])
    x, y = data.train_batch(indices, generator(1))
    assert torch.equal(x, data.normalize(data.augment(data.train_images[indices], generator(1))))
    assert torch.equal(y, data.train_labels[indices])
    assert torch.equal(load("digits").train_batch(indices)[0], data.train_set()[0][indices])


def test_to_moves_every_tensor():
    moved = load("digits", label_noise=0.1).to("meta")
    assert all(getattr(moved, t).device.type == "meta" for t in (*TENSORS, "noisy"))


@given(fraction=st.floats(0, 1), seed=st.integers(0, 2**40), n=st.integers(1, 60), classes=st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_noise_replaces_exactly_the_stated_number_of_training_labels(fraction, seed, n, classes):
    data = synthetic(torch.zeros(n, 1, 2, 2, dtype=torch.uint8), classes)
    noisy = data.with_label_noise(fraction, seed)
    assert noisy.noisy.sum() == round(fraction * n)
    assert torch.equal(noisy.train_labels[~noisy.noisy], data.train_labels[~noisy.noisy])
    assert set(noisy.train_labels.tolist()) <= set(range(classes))
    assert all(torch.equal(getattr(noisy, t), getattr(data, t)) for t in TENSORS if t != "train_labels")
    less = data.with_label_noise(fraction / 2, seed)
    assert torch.equal(less.noisy & noisy.noisy, less.noisy)
    assert torch.equal(less.train_labels[less.noisy], noisy.train_labels[less.noisy])
    assert torch.equal(noisy.with_label_noise(0.0, seed).noisy, noisy.noisy)


def test_replaced_labels_are_uniform_over_all_classes():
    """χ² with 9 degrees of freedom over the new labels of one true class: above 40 with probability below 1e-5."""
    data = synthetic(torch.zeros(20000, 1, 1, 1, dtype=torch.uint8), 10).with_label_noise(0.5, 7)
    new = data.train_labels[data.noisy & (data.test_labels == 4)]
    expected = len(new) / 10
    assert ((torch.bincount(new, minlength=10) - expected) ** 2 / expected).sum() < 40


def shifted(image: Tensor, top: int, left: int, flip: int, pad: int) -> Tensor:
    """The slow oracle: one image, pixel by pixel."""
    channels, height, width = image.shape
    out = torch.zeros_like(image)
    for c, i, j in itertools.product(range(channels), range(height), range(width)):
        y, x = i + top - pad, (width - 1 - j if flip else j) + left - pad
        if 0 <= y < height and 0 <= x < width:
            out[c, i, j] = image[c, y, x]
    return out


@pytest.mark.parametrize(("flip", "crop"), [(False, 1), (True, 0), (True, 1), (True, 2)])
def test_every_augmented_image_is_a_shift_and_flip_of_itself_and_all_are_equally_likely(flip, crop):
    """χ² over the k variants: above k + 6 √(2k) + 12 with probability below 1e-6."""
    images = random_images(2, (2, 4, 5))
    options = list(itertools.product(range(2 * crop + 1), range(2 * crop + 1), range(1 + flip)))
    variants = torch.stack([torch.stack([shifted(x, *option, crop) for option in options]) for x in images])
    n, k = 5000, len(options)
    owner = torch.arange(n) % 2
    augmented = synthetic(images, flip=flip, crop=crop).augment(images[owner], generator(3))
    assert augmented.dtype == torch.uint8
    matches = (augmented[:, None] == variants[owner]).flatten(2).all(2)  # [n, k]
    assert torch.equal(matches.sum(1), torch.ones(n, dtype=torch.int64))
    assert ((matches.sum(0) - n / k) ** 2 / (n / k)).sum() < k + 6 * (2 * k) ** 0.5 + 12


@given(shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)), n=st.integers(0, 4))
@settings(max_examples=20, deadline=None)
def test_no_flip_and_no_crop_is_the_identity_and_draws_nothing(shape, n):
    images, source = random_images(n, shape), generator()
    before = source.get_state()
    assert torch.equal(synthetic(images).augment(images, source), images)
    assert torch.equal(source.get_state(), before)
    assert torch.equal(synthetic(images).augment(images, None), images)


@given(n=st.integers(1, 40), data=st.data(), seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_an_epoch_is_a_permutation_in_batches(n, data, seed):
    size = data.draw(st.integers(1, n))
    batches = list(epoch_indices(n, size, generator(seed), drop_last=False))
    assert sorted(torch.cat(batches).tolist()) == list(range(n))
    assert [len(b) for b in batches] == [min(size, n - start) for start in range(0, n, size)]
    full = list(epoch_indices(n, size, generator(seed)))
    assert [len(b) for b in full] == [size] * (n // size)
    assert all(torch.equal(a, b) for a, b in zip(full, batches, strict=False))


def test_batch_size_is_checked_at_the_call():
    explained("batch_size=11 for 10 examples", epoch_indices, 10, 11, generator())
    explained("batch_size=0", epoch_indices, 10, 0, generator())


def test_image_folder_round_trip(folder):
    (folder / "train" / "cat" / ".hidden").write_text("not an image")
    (folder / "train" / "README").write_text("not a class")
    calls: list[tuple[int, int]] = []
    data = load(str(folder), augment=True, progress=lambda done, total: calls.append((done, total)))
    assert (data.name, data.classes, data.input_shape) == (folder.name, ("ant", "bee", "cat"), (3, 4, 6))
    assert data.augmentation == Augmentation(flip=True, crop=0)
    assert calls == [(i, 24) for i in range(1, 25)]
    pairs = {"train": (data.train_images, data.train_labels), "test": (data.test_images, data.test_labels)}
    for split, (images, labels) in pairs.items():
        for image, label in zip(images, labels, strict=True):
            number = int(image[1, 0, 0])
            with Image.open(folder / split / data.classes[label] / f"{number}.png") as stored:
                assert np.array_equal(np.asarray(stored), image.permute(1, 2, 0).numpy())
        assert len(set(rows(images, labels))) == len(labels) == {"train": 15, "test": 9}[split]
    assert sorted(load(folder).train_labels[:3].tolist()) == [0, 1, 2]


def test_gray_folders_stay_gray_and_mixed_ones_become_rgb(tmp_path):
    pixels = np.arange(100, dtype=np.uint8).reshape(10, 10)
    for split, label in itertools.product(("train", "test"), "ab"):
        write(tmp_path / split / label / "x.png", pixels)
    gray = load(tmp_path, augment=True)
    assert (gray.input_shape, gray.augmentation.crop) == ((1, 10, 10), 1)
    assert torch.equal(gray.train_images[0, 0], torch.from_numpy(pixels))
    write(tmp_path / "test" / "b" / "y.png", np.zeros((10, 10, 3), dtype=np.uint8))
    mixed = load(tmp_path)
    assert mixed.input_shape == (3, 10, 10)
    assert torch.equal(mixed.train_images[0], torch.from_numpy(pixels).expand(3, -1, -1))


@pytest.mark.parametrize(("image_size", "shape"), [(5, (5, 5)), ((3, 8), (3, 8))])
def test_resizing_is_pillows_and_joins_sizes(folder, image_size, shape):
    pixels = random_images(1, (12, 13, 3))[0].numpy()
    write(folder / "train" / "ant" / "large.png", pixels)
    data = load(folder, image_size=image_size)
    assert data.input_shape == (3, *shape)
    expected = np.array(Image.fromarray(pixels).resize(shape[::-1], Image.Resampling.BILINEAR))
    assert any(torch.equal(x, torch.from_numpy(expected).permute(2, 0, 1)) for x in data.train_images)
    digits = load("digits", image_size=image_size)
    assert (digits.input_shape, digits.train_images.dtype) == ((1, *shape), torch.uint8)


def test_doubling_named_images_agrees_with_pillow():
    small, large = load("digits", train_size=20), load("digits", train_size=20, image_size=16)
    for image, resized in zip(small.train_images, large.train_images, strict=True):
        expected = Image.fromarray(image[0].numpy()).resize((16, 16), Image.Resampling.BILINEAR)
        assert np.abs(np.asarray(expected).astype(int) - resized[0].numpy().astype(int)).max() <= 1


@pytest.mark.parametrize(("name", "directory"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_idx_files_are_read_from_the_root(name, directory, tmp_path, monkeypatch):
    raw = tmp_path / directory / "raw"
    raw.mkdir(parents=True)
    images, labels = random_images(20, (1, 28, 28)), torch.arange(20) % 10
    for part in ("train", "t10k"):
        header = struct.pack(">iiii", 0x803, 20, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.numpy().tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 0x801, 20) + bytes(labels.tolist()))
    monkeypatch.setenv("BNSHARP_DATA", str(tmp_path))
    data = load(name, download=False)
    assert (data.input_shape, len(data.classes)) == ((1, 28, 28), 10)
    assert rows(data.train_images, data.train_labels) == rows(images, labels)
    assert rows(data.test_images, data.test_labels) == rows(images, labels)


@pytest.mark.parametrize(
    ("name", "dataset", "layout", "labels"),
    [("cifar10", "CIFAR10", (0, 2, 3, 1), "targets"), ("svhn", "SVHN", (0, 1, 2, 3), "labels")],
)
def test_colour_layouts(name, dataset, layout, labels, tmp_path, monkeypatch):
    images, targets = random_images(12, (3, 32, 32)), [0, 1, 2] * 4
    splits = []

    def make(root, split, download):
        splits.append(split)
        return SimpleNamespace(data=images.permute(layout).numpy(), **{labels: targets})

    monkeypatch.setattr(torchvision.datasets, dataset, make)
    data = load(name, root=tmp_path)
    assert (data.input_shape, data.train_images.is_contiguous(), len(data.classes)) == ((3, 32, 32), True, 10)
    assert rows(data.train_images, data.train_labels) == rows(images, torch.tensor(targets))
    assert splits == ([True, False] if dataset == "CIFAR10" else ["train", "test"])


@pytest.mark.parametrize("name", sorted(set(DATASETS) - {"digits"}))
def test_missing_files_without_network_are_explained(name, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="BNSHARP_DATA") as caught:
        load(name, root=tmp_path, download=False)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", Mock(side_effect=URLError("no route\nto host")))
    with pytest.raises(InputError, match="no route to host"):
        load("cifar10", root=tmp_path)


def test_registry_describes_every_data_set():
    assert all(spec.summary and spec.source for spec in DATASETS.values())
    standard = {name: (spec.augmentation.flip, spec.augmentation.crop) for name, spec in DATASETS.items()}
    assert (standard["digits"], standard["mnist"]) == ((False, 1), (False, 2))
    assert standard["cifar10"] == standard["cifar100"] == (True, 4)


def explained(message: str, call, *args, **kwargs) -> None:
    with pytest.raises(InputError, match=message) as caught:
        call(*args, **kwargs)
    assert re.fullmatch(r"[^\n]*; expected [^\n]*", str(caught.value))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("digit", {}, "did you mean 'digits'"),
        ("no/such/folder", {}, "digits, cifar10, cifar100, mnist, fashion-mnist, svhn"),
        ("digits", {"label_noise": -0.1}, "label noise -0.1"),
        ("digits", {"label_noise": float("nan")}, "label noise nan"),
        ("digits", {"train_size": 1797}, "at most 1796"),
        ("digits", {"train_size": 0}, "train_size=0"),
        ("digits", {"validation": 1.0}, "validation=1.0; expected a fraction"),
        ("digits", {"validation": True}, "validation=True"),
        ("digits", {"validation": 1e-4}, "800 for training, 0 for validation"),
        ("digits", {"seed": -1}, "seed=-1"),
        ("digits", {"image_size": 0}, "image_size=0"),
        ("digits", {"image_size": (3, 4, 5)}, r"image_size=\(3, 4, 5\)"),
    ],
)
def test_bad_arguments_are_explained_in_one_line(name, options, message):
    explained(message, load, name, **options)


def test_bad_folders_are_explained_in_one_line(folder):
    explained("at most 15", load, folder, train_size=16)
    explained("neither a data set nor a folder", load, folder / "train" / "ant" / "0.png")
    (folder / "train" / "dog").mkdir()
    explained(r"only in train/: \['dog'\]", load, folder)
    (folder / "test" / "dog").mkdir()
    explained("dog is empty", load, folder)
    write(folder / "train" / "dog" / "x.png", np.zeros((4, 6, 3), dtype=np.uint8))
    bad = folder / "test" / "dog" / "bad.png"
    bad.write_bytes(b"no image")
    explained("bad.png is not a readable image", load, folder)
    bad.write_bytes((folder / "train" / "ant" / "0.png").read_bytes()[:60])
    explained("bad.png is not a readable image", load, folder)
    write(bad, np.zeros((4, 6), dtype=np.uint16))
    explained("8 bits", load, folder)
    write(bad, np.zeros((4, 7, 3), dtype=np.uint8))
    explained(r"bad.png is of size \(4, 7\).*pass image_size", load, folder)
    assert load(folder, image_size=4).input_shape == (3, 4, 4)
    for split in ("test", "train"):
        (folder / split).rename(folder / f"no {split}")
        explained(f"{split} is empty or missing", load, folder)


def test_bad_calls_on_data_are_explained():
    data = load("digits", augment=True)
    explained("n=801.*at most 800", data.train_set, 801)
    explained("n=998.*at most 997", data.test_set, 998)
    explained("n=0", data.train_set, 0)
    explained("between 0 and 1", data.with_label_noise, 1.01, 0)
    explained("seed=-1", data.with_label_noise, 0.1, -1)
    explained("generator=None", data.train_batch, torch.arange(3))
    explained("crop=-1", Augmentation, crop=-1)
