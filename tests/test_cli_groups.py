"""``bnsharp groups``: what is printed is what the network has, and bad usage is one line."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from helpers import Done
from torchvision import models

import bnsharp

KEYS = {
    "source", "network", "inputs", "seed", "parameters", "coordinates", "invariant_parameters",
    "invariant_coordinates", "inert_parameters", "inert_coordinates", "groups", "forwards", "residual", "seconds",
    "found",
}


def record(done: Done) -> dict[str, Any]:
    """The one JSON object on standard output."""
    assert done.code == 0, done.err
    assert len(done.out.splitlines()) == 1
    found = json.loads(done.out)
    assert set(found) == KEYS
    assert found["seconds"] > 0 and found["residual"] < 1e-8
    return found


def test_the_record_is_what_the_library_finds(run: Any) -> None:
    found = record(run("groups", "torchvision:resnet18", "--shape", "3,32,32", "--examples", "5", "--json"))
    torch.manual_seed(0)
    net = models.resnet18(weights=None)
    groups = bnsharp.scale_groups(net, torch.randn(5, 3, 32, 32))
    sizes = {k: p.numel() for k, p in net.named_parameters()}
    assert found["network"] == "ResNet" and found["inputs"] == [5, 3, 32, 32]
    assert [(g["kind"], tuple(g["members"]), g["blocks"]) for g in found["found"]] == [
        (g.kind, g.members, g.blocks) for g in groups
    ]
    assert found["forwards"] == groups.forwards and found["groups"] == groups.partition.count
    assert found["parameters"] == len(sizes) and found["coordinates"] == sum(sizes.values())
    assert found["invariant_parameters"] == 36
    assert found["invariant_coordinates"] == sum(sizes[k] for k in groups.invariant)
    assert found["inert_parameters"] == found["inert_coordinates"] == 0


def test_the_table_counts(run: Any) -> None:
    pytest.importorskip("timm")
    done = run("groups", "timm:test_efficientnet", "--shape", "3,32,32")
    assert done.code == 0, done.err
    net = pytest.importorskip("timm").create_model("test_efficientnet", pretrained=False)
    total = sum(p.numel() for p in net.parameters())
    summary = done.out.splitlines()[-3:]
    assert "conv_stem.weight" in done.out and "row" in done.out
    assert summary[0].startswith("invariant: ") and summary[1].startswith("inert: ")
    assert all(f"of {total} coordinates" in line for line in summary[:2])
    assert "forward passes" in summary[2]


def test_a_run_folder_is_probed_on_its_own_data(run: Any) -> None:
    small = ["--epochs", "1", "--batch-size", "32", "--set", "train_size=64", "--set", "width=8", "--set", "depth=1"]
    assert run("train", *small, "--out", "run").code == 0
    found = record(run("groups", "run", "--json"))
    assert found["inputs"] == [8, 1, 8, 8] and found["groups"] == 8
    assert found["found"] == [{"kind": "row", "members": ["linear1.weight"], "blocks": 8, "coordinates": 512}]
    again = record(run("groups", "run/checkpoint.pt", "--data", "digits", "--examples", "16", "--json"))
    assert again["inputs"] == [16, 1, 8, 8] and again["found"] == found["found"]


def test_options_of_the_network_are_taken(run: Any) -> None:
    pytest.importorskip("timm")
    found = record(run("groups", "timm:test_vit", "--set", "img_size=32", "--shape", "3,32,32", "--json"))
    assert found["found"] == [] and found["forwards"] == 3
    done = run("groups", "timm:test_vit", "--set", "img_size=32", "--shape", "3,32,32")
    assert done.code == 0 and "0 groups" in done.out and "rescaled" not in done.out


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["torchvision:resnet81"], "resnet18"),
        (["nothing-here"], "expected a run folder"),
        (["torchvision:resnet18", "--shape", "3,x"], "whole numbers"),
        (["torchvision:resnet18", "--shape", "3,0,32"], "whole numbers"),
        (["torchvision:resnet18", "--shape", "5,32,32"], "channels"),
        (["torchvision:vit_b_16"], "224"),
        (["torchvision:resnet18", "--examples", "3"], "4 to 16"),
        (["torchvision:resnet18", "--examples", "17"], "4 to 16"),
        (["torchvision:resnet18", "--model", "bn-mlp"], "--model"),
        (["torchvision:resnet18", "--set", "depth=3"], "options"),
        (["torchvision:resnet18", "--data", "digits", "--shape", "1,8,8"], "--shape"),
        (["somewhere", "--set", "depth=3"], "--set"),
        (["torchvision:resnet18", "--set", "depth"], "key=value"),
        (["torchvision:resnet18", "--nothing"], "--nothing"),
    ],
)
def test_bad_usage_is_refused_in_one_line(run: Any, arguments: list[str], word: str) -> None:
    done = run("groups", *arguments)
    assert done.code == 2
    assert done.out == ""
    assert len(done.err.splitlines()) == 1 and done.err.startswith("bnsharp: ")
    assert word in done.err
