"""Networks of libraries, residual networks and data in torchvision's files, trained from the command line."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from helpers import assert_same, one_line, read_lines

from bnsharp.checkpoint import CHECKPOINT, METRICS, load
from bnsharp.data import ImageData
from bnsharp.data import load as load_data
from bnsharp.errors import InputError
from bnsharp.experiments.config import make_config
from bnsharp.experiments.networks import library, network
from bnsharp.experiments.run import prepare, read_run

SHORT = ["--algorithm", "sgd", "--epochs", "1", "--set", "threads=1", "--out", "run"]
CHEAP = ["--measure", "gaussian", "--set", "draws=2", "--examples", "16", "--precision", "float32", "--json"]


def trained(run: Any, *arguments: Any) -> dict[str, Any]:
    """The record of a short run, whose folder can be read and measured."""
    done = run("train", *arguments, *SHORT)
    assert done.code == 0, done.err
    _, net, _ = read_run("run")
    assert_same(dict(net.state_dict()), dict(load(Path("run") / CHECKPOINT)["module"]))
    measured = run("measure", "run", *CHEAP)
    assert measured.code == 0 and np.isfinite(json.loads(measured.out)["gaussian"]["value"]), measured.err
    (record,) = read_lines(Path("run") / METRICS)
    return record


# ---------------------------------------------------------------- networks


@pytest.mark.parametrize(("model", "settings"), [
    ("resnet18", ["width=0.05"]), ("wideresnet", ["depth=10", "width=1", "dropout=0.1"]),
    ("torchvision:shufflenet_v2_x0_5", []), ("timm:test_resnet", []), ("timm:test_vit", ["model_options.patch_size=4"]),
])
def test_networks_are_trained_and_measured(run, model, settings):
    pytest.importorskip("timm")
    record = trained(run, "--model", model, "--batch-size", "32", "--set", "train_size=64",
                     *(f"--set={s}" for s in settings))
    assert record["steps"] == 2


def test_the_default_folder_has_no_colon(run, tmp_path):
    done = run("train", "--model", "torchvision:resnet18", "--batch-size", "32", "--set", "train_size=32", *SHORT[:-2])
    assert done.code == 0 and (tmp_path / "runs" / "digits-torchvision-resnet18-sgd-0" / METRICS).exists()


def digits() -> ImageData:
    return load_data("digits", train_size=16)


def test_gray_images_are_three_equal_channels_for_torchvision():
    data = digits()
    net = network("torchvision:resnet18")(data, 3, {}).eval()
    x, _ = data.train_set(4)
    plain = torchvision.models.resnet18(num_classes=10)
    plain.load_state_dict(net.state_dict())  # the same names
    assert torch.equal(net(x), plain.eval()(x.repeat(1, 3, 1, 1)))
    theta = dict(net.named_parameters())
    assert torch.equal(torch.func.functional_call(net, theta, (x,)), net(x))


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:test_resnet"])
def test_weights_are_a_function_of_the_seed_and_leave_the_global_state_alone(name):
    pytest.importorskip("timm")
    before = torch.get_rng_state()
    nets = [network(name)(digits(), seed, {}).state_dict() for seed in (1, 1, 2)]
    assert torch.equal(before, torch.get_rng_state())
    assert_same(dict(nets[0]), dict(nets[1]))
    assert any(not torch.equal(nets[0][k], nets[2][k]) for k in nets[0])


def test_networks_of_timm_are_made_for_the_images():
    pytest.importorskip("timm")
    net = network("timm:test_vit")(digits(), 0, {"patch_size": 2})
    assert net.patch_embed.img_size == (8, 8) and net.head.out_features == 10
    assert net.patch_embed.proj.in_channels == 1


BAD = [
    ("torchvision:resnet81", {}, "did you mean 'resnet18'"), ("timm:resnet81", {}, "did you mean 'resnet18'"),
    ("resnet", {}, "did you mean 'resnet18'"), ("torchvision:", {}, "torchvision:NAME"),
    ("torchvision:resnet18", {"widht": 3}, "widht"), ("timm:test_resnet", {"widht": 3}, "widht"),
    ("torchvision:vit_b_16", {}, "image_size"),  # made for 224 pixels
    ("torchvision:googlenet", {"init_weights": "false"}, "too small"),
    ("torchvision:googlenet", {"init_weights": "false", "image_size": 32}, "GoogLeNetOutputs"),  # in training
    ("timm:test_vit", {}, "test_vit"),  # patches of 16 pixels
    ("torchvision:resnet18", {"num_classes": 3}, "labels"),
]


@pytest.mark.parametrize(("model", "options", "word"), BAD, ids=lambda v: str(v))
@pytest.mark.filterwarnings("ignore:The default weight initialization")
def test_networks_that_cannot_be_trained_are_refused_in_one_line(run, model, options, word):
    pytest.importorskip("timm")
    settings = [f"--set={k if k == 'image_size' else f'model_options.{k}'}={v}" for k, v in options.items()]
    done = run("train", "--model", model, "--batch-size", "32", "--set", "train_size=64", *settings, *SHORT)
    assert done.code == 2 and done.out == "" and len(done.err.splitlines()) == 1, done
    assert word in done.err and list(Path.cwd().iterdir()) == []


def test_two_channels_are_none_of_torchvisions():
    images, labels = torch.zeros(4, 2, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
    data = ImageData("two", images, labels, images, labels, ("a", "b"), torch.zeros(2), torch.ones(2))
    with pytest.raises(InputError) as caught:
        network("torchvision:resnet18")(data, 0, {})
    assert "2 channels" in one_line(caught.value)


def test_a_library_alone_has_its_own_number_of_classes():
    made = library("torchvision:resnet18")
    assert made is not None and made(0, {}).fc.out_features == 1000
    assert library("bn-mlp") is None and library("timm:") is None


# ---------------------------------------------------------------- data


def pixels(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def fashion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fashion-MNIST as torchvision keeps it: idx files, 40 training and 20 test images."""
    root = tmp_path_factory.mktemp("fashion")
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for seed, (part, n) in enumerate((("train", 40), ("t10k", 20))):
        header = struct.pack(">iiii", 0x803, n, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + pixels((n, 28, 28), seed).tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 0x801, n) + bytes(i % 10 for i in range(n)))
    return root


@pytest.fixture
def svhn(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """SVHN as torchvision keeps it: MATLAB files, axes H W C N, a zero labelled 10; 40 training and 20 test images."""
    root, known = tmp_path_factory.mktemp("svhn"), dict(torchvision.datasets.SVHN.split_list)
    for seed, (part, n) in enumerate((("train", 40), ("test", 20))):
        file = root / f"{part}_32x32.mat"
        labels = np.array([[i % 10 + 1] for i in range(n)], dtype=np.uint8)
        scipy.io.savemat(file, {"X": pixels((32, 32, 3, n), seed), "y": labels})
        known[part] = [known[part][0], file.name, hashlib.md5(file.read_bytes()).hexdigest()]
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", known)  # the sums of the real files
    return root


def test_fashion_mnist_is_trained_on(run, fashion):
    record = trained(run, "--data", "fashion-mnist", "--set", f"root={fashion}", "--set", "download=false",
                     "--model", "lenet-bn", "--batch-size", "20", "--set", "augment=true")
    assert record["steps"] == 2 and 0 <= record["test_accuracy"] <= 1


def test_svhn_is_trained_on(run, svhn):
    record = trained(run, "--data", "svhn", "--set", f"root={svhn}", "--set", "download=false", "--model", "wideresnet",
                     "--set", "depth=10", "--set", "width=1", "--batch-size", "20", "--set", "augment=true")
    assert record["steps"] == 2
    _, _, data = read_run("run")
    assert data.input_shape == (3, 32, 32) and sorted(data.train_labels.tolist()) == sorted([*range(10)] * 4)


def test_damaged_files_are_refused_in_one_line(run, svhn, fashion):
    (svhn / "test_32x32.mat").write_bytes(b"nothing")
    raw = fashion / "FashionMNIST" / "raw" / "train-images-idx3-ubyte"
    raw.write_bytes(raw.read_bytes()[:100])
    for name, root in (("svhn", svhn), ("fashion-mnist", fashion)):
        settings = ["--set", f"root={root}", "--set", "download=false"]
        done = run("train", "--data", name, "--model", "conv-bn", *settings, *SHORT)
        assert done.code == 2 and len(done.err.splitlines()) == 1 and str(root) in done.err, done.err
        assert list(Path.cwd().iterdir()) == []


def test_prepared_networks_take_a_memory_format():
    pytest.importorskip("timm")
    prepared = prepare(make_config({
        "model": "timm:test_resnet", "channels_last": True, "batch_size": 16, "data_options": {"train_size": 32},
        "algorithm": "sgd",
    }))
    x, _ = prepared.data.train_set(8)
    assert prepared.place(x.expand(-1, 3, -1, -1)).is_contiguous(memory_format=torch.channels_last)
