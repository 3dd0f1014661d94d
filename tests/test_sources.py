"""What can be measured opens as the network it holds; what cannot is one line, exit code 2, no file, no code run."""

from __future__ import annotations

import functools
import json
import pickle
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_same, one_line, tree
from safetensors.torch import save_file
from torch import Tensor, nn

from bnsharp.cli import main
from bnsharp.data import ImageData, load
from bnsharp.errors import InputError
from bnsharp.experiments import networks, sources
from bnsharp.experiments.config import make_config
from bnsharp.experiments.run import train
from bnsharp.experiments.sources import open_source
from bnsharp.experiments.weights import fit_weights, read_weights
from bnsharp.models import build

CHEAP = ["--measure", "gaussian", "--set", "draws=2", "--examples", "40", "--precision", "float32", "--json"]


def mlp(seed: int = 3) -> nn.Module:
    """The network that ``--model bn-mlp --data digits`` builds, with running statistics of its own."""
    module = build("bn-mlp", (1, 8, 8), 10, seed=seed)
    module.load_state_dict({k: v + 0.5 if "running" in k else v for k, v in module.state_dict().items()})
    return module


@pytest.fixture
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for files to be opened, apart from the one that the command runs in."""
    return tmp_path_factory.mktemp("files")


@pytest.fixture
def run(run: Callable[..., Any]) -> Callable[..., Any]:
    """``bnsharp measure …`` in an empty folder: exit code, standard output, standard error."""
    return functools.partial(run, "measure")


@pytest.fixture
def refused(run: Callable[..., Any], files: Path) -> Callable[..., str]:
    """A command is refused: exit code 2, one line with these words, nothing written anywhere."""

    def check(*arguments: Any, words: tuple[str, ...]) -> str:
        before = tree(files)
        code, out, err = run(*arguments)
        assert code == 2 and out == "", (out, err)
        (line,) = err.splitlines()
        assert line.startswith("bnsharp: ") and all(word in line for word in words), line
        assert list(Path.cwd().iterdir()) == [] and tree(files) == before
        return line

    return check


# ---------------------------------------------------------------- what opens


def saved(kind: str, state: dict[str, Tensor], path: Path) -> Path:
    """The same tensors as one kind of file."""
    wrapped: dict[str, Any] = {
        "bare": state, "state_dict": {"state_dict": state, "epoch": 3},
        "model": {"model": state, "optimizer": {"a": 1}}, "module": {"module": state},
        "deep": {"model": {"state_dict": state}},
        "model_state_dict": {"model_state_dict": state, "loss": 0.5},
        "parallel": {f"module.{k}": v for k, v in state.items()},
        "compiled": {"state_dict": {f"module._orig_mod.{k}": v for k, v in state.items()}},
        "lightning": {"state_dict": {f"net.{k}": v for k, v in state.items()}},
        "uncounted": {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")},
        "half": {k: v.half() if v.is_floating_point() else v for k, v in state.items()},
    }
    if kind == "safetensors":
        file = path / "weights.safetensors"
        save_file(state, file)
    else:
        file = path / "weights.pth"
        torch.save(wrapped[kind], file)
    return file


@pytest.mark.parametrize("kind", [
    "bare", "state_dict", "model", "module", "model_state_dict", "deep", "parallel", "compiled", "lightning",
    "uncounted", "safetensors", "half",
])
def test_a_file_of_weights_is_the_network_it_holds(kind, tmp_path):
    net = mlp()
    path = saved(kind, dict(net.state_dict()), tmp_path)
    opened = open_source(str(path), data="digits", model="bn-mlp")
    expected = dict(net.state_dict())
    if kind == "half":
        expected = {k: v.half().float() if v.is_floating_point() else v for k, v in expected.items()}
    assert_same(dict(opened.module.state_dict()), expected)
    assert opened.data.name == "digits" and opened.data.input_shape == (1, 8, 8)


def test_a_prefix_stays_where_it_is_the_networks_own():
    """A network with a part called ``module``; and one whose only part is."""
    for net in (nn.ModuleDict({"module": nn.Linear(2, 2), "head": nn.Linear(2, 2)}),
                nn.ModuleDict({"module": nn.Linear(2, 2)})):
        state = {k: v + 1 for k, v in net.state_dict().items()}
        for given in (state, {f"module.{k}": v for k, v in state.items()}):
            fit_weights(net, given, "here")
            assert_same(dict(net.state_dict()), state)


def test_a_prefix_that_helps_nothing_stays_in_the_message():
    with pytest.raises(InputError) as caught:
        fit_weights(nn.Linear(2, 2), {"module.weights": torch.zeros(2, 2)}, "here")
    assert "'weight'" in one_line(caught.value)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_weights_of_a_librarys_network_have_an_output_per_class(library, suffix, images, files, run):
    pytest.importorskip(library)
    name = {"torchvision": "torchvision:resnet18", "timm": "timm:resnet18"}[library]
    net = networks.network(name)(load(str(images)), 7, {})
    assert list(net.state_dict()["fc.weight"].shape) == [2, 512]
    path = files / f"weights.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(net.state_dict(), path)
    opened = open_source(str(path), data=str(images), model=name)
    assert_same(dict(opened.module.state_dict()), dict(net.state_dict()))
    if library == "torchvision":
        code, out, err = run(path, "--model", name, "--data", images, *CHEAP[:4], "--precision", "float32", "--json")
        assert code == 0 and json.loads(out)["gaussian"]["batch_size"] == 8, err


def test_a_gray_network_of_timm_takes_gray_images():
    pytest.importorskip("timm")
    data = load("digits")
    net = networks.network("timm:resnet10t")(data, 0, {"stem_type": ""})
    assert net(data.normalize(data.train_images[:2])).shape == (2, 10)


def test_a_librarys_network_alone_is_untrained_and_depends_on_the_seed(images):
    nets = [open_source("torchvision:resnet18", data=str(images), seed=seed).module for seed in (0, 0, 1)]
    weights = [net.state_dict()["fc.weight"] for net in nets]
    assert list(weights[0].shape) == [1000, 512]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_run_and_its_files_still_open(tmp_path):
    config = make_config({"epochs": 1, "batch_size": 32, "data_options": {"train_size": 64}, "algorithm": "sgd",
                          "model_options": {"width": 8, "depth": 1}, "threads": 1})
    prepared, _ = train(config, tmp_path / "run")
    expected = dict(prepared.module.state_dict())
    for source in (tmp_path / "run", tmp_path / "run" / "checkpoint.pt"):
        assert_same(dict(open_source(str(source)).module.state_dict()), expected)
    save_file(expected, tmp_path / "run" / "weights.safetensors")
    opened = open_source(str(tmp_path / "run" / "weights.safetensors"), data="digits", model="bn-mlp",
                         model_options={"width": 8, "depth": 1})
    assert_same(dict(opened.module.state_dict()), expected)


# ---------------------------------------------------------------- weights that do not fit


def changed(state: dict[str, Tensor], fault: str) -> dict[str, Tensor]:
    state = dict(state)
    if fault == "missing":
        del state["linear2.weight"]
    elif fault == "unknown":
        state["tail.weight"] = torch.zeros(2)
    elif fault == "shape":
        state["head.weight"] = torch.zeros(4, 128)
    elif fault == "nan":
        state["linear1.weight"] = state["linear1.weight"].clone().index_fill_(0, torch.tensor([1]), float("nan"))
    elif fault == "infinite":
        state["norm2.running_var"] = torch.full((128,), float("inf"))
    return state


FAULTS = [
    ("missing", ("lacks", "'linear2.weight'")), ("unknown", ("unknown", "'tail.weight'")),
    ("shape", ("shapes", "'head.weight'")), ("nan", ("NaN", "'linear1.weight'", "64 of 8192")),
    ("infinite", ("infinite", "'norm2.running_var'")),
]


@pytest.mark.parametrize(("fault", "words"), FAULTS, ids=lambda v: v if isinstance(v, str) else "")
@pytest.mark.parametrize("kind", ["state_dict", "safetensors"])
def test_weights_that_do_not_fit_are_refused_with_their_keys(fault, words, kind, files, refused):
    path = saved(kind, changed(mlp().state_dict(), fault), files)
    refused(path, "--model", "bn-mlp", "--data", "digits", *CHEAP, words=(path.name, *words))


def test_a_run_whose_weights_are_not_finite_is_refused(files, refused):
    config = make_config({"epochs": 1, "batch_size": 32, "data_options": {"train_size": 64}, "algorithm": "sgd",
                          "model_options": {"width": 8, "depth": 1}, "threads": 1})
    train(config, files / "run")
    path = files / "run" / "checkpoint.pt"
    payload = torch.load(path, weights_only=True)
    payload["module"]["head.bias"][2] = float("nan")
    torch.save(payload, path)
    refused(files / "run", *CHEAP, words=("'head.bias'", "1 of 10"))


def test_a_module_stays_as_it_was_when_weights_do_not_fit():
    net = mlp()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    other = {k: v + 1 if v.is_floating_point() else v for k, v in before.items()}
    for fault, _ in FAULTS:
        with pytest.raises(InputError):
            fit_weights(net, changed(other, fault), "here")
        assert_same(dict(net.state_dict()), before)
    bias = torch.ones(10)
    for tensor in (bias.to_sparse(), bias * 1j, bias.to("meta")):
        with pytest.raises(InputError) as caught:
            fit_weights(net, {**other, "head.bias": tensor}, "here")
        assert "'head.bias'" in one_line(caught.value)
    assert_same(dict(net.state_dict()), before)


def test_a_librarys_head_of_another_size_is_named(images, files, refused):
    net = networks.library("torchvision:resnet18")(0, {})  # 1000 classes
    torch.save(net.state_dict(), files / "imagenet.pth")
    refused(files / "imagenet.pth", "--model", "torchvision:resnet18", "--data", images, *CHEAP,
            words=("'fc.weight'", "'fc.bias'", "ResNet"))


# ---------------------------------------------------------------- files that are none


class Attack:
    """A pickle that makes a file when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("form", ["torch", "legacy", "pickle", "module"])
def test_a_pickle_of_code_is_refused_and_not_run(form, files, refused):
    trace, path = files / "trace", files / "weights.pt"
    payload: Any = {"state_dict": {"w": torch.zeros(2), "x": Attack(trace)}}
    if form == "pickle":
        path.write_bytes(pickle.dumps(payload))
    else:
        torch.save(mlp() if form == "module" else payload, path, _use_new_zipfile_serialization=form != "legacy")
    refused(path, "--model", "bn-mlp", "--data", "digits", *CHEAP, words=("weights.pt", "plain tensors"))
    assert not trace.exists()


def test_truncated_files_are_refused(files, refused):
    for kind, name in (("bare", "weights.pth"), ("safetensors", "weights.safetensors")):
        path = saved(kind, dict(mlp().state_dict()), files)
        content = path.read_bytes()
        for length in (0, 5, 40, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:length])
            refused(path, "--model", "bn-mlp", "--data", "digits", *CHEAP, words=(name,))


HEADERS = {
    "text": b"these are notes, not weights", "huge": b"\xff" * 64,
    "not JSON": struct.pack("<Q", 16) + b"{not json at all",
    "no object": struct.pack("<Q", 9) + b"[1, 2, 3]",
    "outside": struct.pack("<Q", 62) + b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}       ',
    "negative": struct.pack("<Q", 62) + b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[16,0]}}       ',
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS.keys())
def test_a_garbage_safetensors_header_is_refused(header, files, refused):
    (files / "weights.safetensors").write_bytes(header)
    refused(files / "weights.safetensors", "--model", "bn-mlp", "--data", "digits", *CHEAP,
            words=("weights.safetensors is not a safetensors file",))


@pytest.mark.parametrize("payload", [
    {"state_dict": {"w": 3}}, {"epoch": 4}, {}, {"state_dict": {}}, {1: torch.zeros(2)}, torch.zeros(2),
    {"model": [torch.zeros(2)]},
], ids=["number", "no tensors", "empty", "empty inside", "numbered", "tensor", "list"])
def test_what_is_no_dictionary_of_tensors_is_refused(payload, files, refused):
    torch.save(payload, files / "weights.pt")
    refused(files / "weights.pt", "--model", "bn-mlp", "--data", "digits", *CHEAP, words=("weights.pt", "expected"))


@pytest.mark.parametrize(("package", "arguments"), [
    ("safetensors", ["weights.safetensors", "--model", "bn-mlp"]), ("timm", ["timm:resnet18"]),
    ("timm", ["weights.pth", "--model", "timm:resnet18"]),
])
def test_a_missing_package_is_named(package, arguments, files, refused, monkeypatch):
    for name in [m for m in sys.modules if m.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    (files / arguments[0]).write_bytes(b"anything")
    source = arguments[0] if ":" in arguments[0] else files / arguments[0]
    refused(source, *arguments[1:], "--data", "digits", *CHEAP, words=(package, f"bnsharp[{package}]"))


# ---------------------------------------------------------------- sources, models and data that do not go together


@pytest.mark.parametrize(("arguments", "words"), [
    (["weights.pth"], ("--model",)), (["weights.safetensors"], ("--model",)),
    (["weights.pth", "--model", "bn-mlp"], ("--data",)),
    (["weights.pth", "--model", "bn-mpl", "--data", "digits"], ("bn-mlp", "torchvision:NAME")),
    (["weights.pth", "--model", "torchvision:resnet81", "--data", "digits"], ("did you mean 'resnet18'",)),
    (["weights.pth", "--model", "timm:resnet18x", "--data", "digits"], ("did you mean",)),
    (["weights.pth", "--model", "torchvision:", "--data", "digits"], ("torchvision:",)),
    (["weights.pth", "--model", "vgg11-bn", "--data", "digits"], ("32",)),
    (["missing.pth", "--model", "bn-mlp", "--data", "digits"], ("missing.pth",)),
    (["torchvision:resnet18", "--model", "bn-mlp", "--data", "digits"], ("--model",)),
    (["torchvision:fasterrcnn_resnet50_fpn", "--data", "digits"], ("fasterrcnn",)),
    (["weights.pth", "--model", "bn-mlp", "--data", "digits", "--examples", "0"], ("examples=0",)),
], ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_what_does_not_go_together_is_refused(arguments, words, files, refused):
    saved("bare", dict(mlp().state_dict()), files)
    saved("safetensors", dict(mlp().state_dict()), files)
    source = arguments[0] if ":" in arguments[0] else files / arguments[0]
    settings = CHEAP if "--examples" not in arguments else [*CHEAP[:4], "--json"]
    refused(source, *arguments[1:], *settings, words=words)


def test_a_network_that_refuses_the_images_is_told(images, files, refused, tmp_path_factory):
    """By an assertion of its own, by a shape, or by too few outputs."""
    refused("torchvision:vit_b_16", "--data", images, *CHEAP, words=("VisionTransformer", "(3, 32, 32)", "height"))
    refused("torchvision:resnet18", "--data", "digits", *CHEAP, words=("ResNet", "(1, 8, 8)"))


def test_fewer_outputs_than_classes_are_told():
    data = load("digits")
    for net, word in ((nn.Sequential(nn.Flatten(), nn.Linear(64, 9)), "[2, 9]"), (nn.Identity(), "[2, 1, 8, 8]")):
        with pytest.raises(InputError) as caught:
            sources._require_fit(sources.Source(nn.Sequential(net, nn.PReLU()), data))
        assert word in one_line(caught.value)
    sources._require_fit(sources.Source(nn.Sequential(nn.Flatten(), nn.Linear(64, 11)), data))


@pytest.mark.parametrize("command", ["measure", "train"])
def test_labels_out_of_range_are_refused(command, files, run, monkeypatch):
    """MNIST files with a label 12: ten classes."""
    raw = files / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, 20 * 784, dtype=np.uint8).tobytes()
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">iiii", 0x803, 20, 28, 28) + pixels)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 0x801, 20) + bytes([*range(10), *[12] * 10]))
    monkeypatch.setenv("BNSHARP_DATA", str(files))
    arguments = {
        "measure": ["torchvision:resnet18", *CHEAP], "train": ["--batch-size", "4", "--epochs", "1", "--out", "run"],
    }[command]
    monkeypatch.setattr(sys, "argv", ["bnsharp", command, "--data", "mnist", *arguments])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 2 and list(Path.cwd().iterdir()) == []


def test_labels_are_checked_wherever_data_is_made():
    images, ok = torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1, 2, 0])
    moments = torch.zeros(1), torch.ones(1)
    assert ImageData("mine", images, ok, images, ok, ("a", "b", "c"), *moments).input_shape == (1, 2, 2)
    for bad in (ok + 1, ok - 1):
        for labels in ((bad, ok), (ok, bad)):
            with pytest.raises(InputError) as caught:
                ImageData("mine", images, labels[0], images, labels[1], ("a", "b", "c"), *moments)
            assert "mine" in one_line(caught.value) and "3 classes" in str(caught.value)


def test_files_without_images_are_refused(files, refused, monkeypatch, images):
    raw = files / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">iiii", 0x803, 0, 28, 28))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 0x801, 0))
    monkeypatch.setenv("BNSHARP_DATA", str(files))
    refused("torchvision:resnet18", "--data", "mnist", *CHEAP, words=("MNIST", str(files)))
    empty = files / "folder"
    shutil.copytree(images, empty)
    for path in (empty / "train" / "dog").iterdir():
        path.unlink()
    refused("torchvision:resnet18", "--data", empty, *CHEAP, words=("dog", "empty"))


def test_reading_weights_leaves_the_file_alone(tmp_path):
    path = saved("safetensors", dict(mlp().state_dict()), tmp_path)
    before = path.read_bytes()
    weights = read_weights(path)
    weights["head.bias"].add_(1)
    assert path.read_bytes() == before
