"""Laws of the model zoo: shapes, where normalization sits, reproducible weights, clear errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bnsharp import scale_groups
from bnsharp.errors import InputError
from bnsharp.models import ACTIVATIONS, MODELS, build

CASES = [
    ("bn-mlp", (1, 8, 8), {}),
    ("bn-mlp", (3, 5, 7), {"width": 6, "depth": 4, "activation": "tanh"}),
    ("lenet-bn", (1, 28, 28), {}),
    ("lenet-bn", (3, 32, 32), {"activation": "softplus", "pool": "avg"}),
    ("lenet-bn", (3, 12, 40), {"logits_bn": False}),
    ("vgg11-bn", (3, 32, 32), {"width": 0.125}),
    ("vgg11-bn", (1, 64, 33), {"width": 0.01}),
    ("conv-bn", (1, 8, 8), {}),
    ("conv-bn", (2, 9, 11), {"width": 3}),
]
RESIDUAL = [
    ("resnet18", (3, 32, 32), {"width": 0.125}),
    ("resnet18", (1, 8, 8), {"width": 0.05}),
    ("wideresnet", (3, 32, 32), {"depth": 10, "width": 1, "dropout": 0.3}),
    ("wideresnet", (2, 9, 11), {"depth": 16, "width": 2}),
]
IDS = [f"{name}-{'x'.join(map(str, shape))}" for name, shape, _ in CASES]
everything = pytest.mark.parametrize(
    ("name", "shape", "options"), CASES + RESIDUAL,
    ids=[f"{name}-{'x'.join(map(str, shape))}" for name, shape, _ in CASES + RESIDUAL],
)


def images(shape: tuple[int, int, int], n: int = 6) -> torch.Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(5))


@everything
def test_logits_have_one_column_per_class(name, shape, options):
    assert build(name, shape, 7, seed=0, **options)(images(shape)).shape == (6, 7)


@pytest.mark.parametrize(("name", "shape", "options"), CASES, ids=IDS)
def test_every_layer_before_a_normalization_ignores_its_rows_scale(name, shape, options):
    """Rows before BN rescaled by positive factors leave the logits unchanged, and rows that no BN follows do not."""
    model = build(name, shape, 4, seed=1, **options).double()
    for module in model:
        if hasattr(module, "eps"):
            module.eps = 1e-30
    x = images(shape).double()
    reference = model(x)
    layers = list(model)
    weighted = [
        (m, after) for m, after in zip(layers, [*layers[1:], None], strict=True) if isinstance(m, nn.Conv2d | nn.Linear)
    ]
    with torch.no_grad():
        for layer, after in weighted:
            normalized = isinstance(after, nn.BatchNorm1d | nn.BatchNorm2d)
            assert (layer.bias is None) == normalized
            factors = torch.linspace(0.5, 2.0, len(layer.weight), dtype=torch.float64)
            layer.weight *= factors.reshape(-1, *[1] * (layer.weight.ndim - 1))
            assert torch.allclose(model(x), reference, atol=1e-9) == normalized


@pytest.mark.parametrize(
    ("name", "shape", "options", "rows"),
    [
        ("bn-mlp", (1, 8, 8), {"width": 12, "depth": 3}, 3 * 12),
        ("lenet-bn", (3, 32, 32), {}, 6 + 16 + 120 + 84 + 10),
        ("lenet-bn", (3, 32, 32), {"logits_bn": False}, 6 + 16 + 120 + 84),
        ("vgg11-bn", (3, 32, 32), {}, 64 + 128 + 2 * 256 + 4 * 512),
        ("conv-bn", (1, 8, 8), {}, 8 + 8),
    ],
)
def test_number_of_batch_normalized_rows(name, shape, options, rows):
    model = build(name, shape, 10, seed=0, **options)
    assert sum(m.num_features for m in model if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)) == rows


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_lenet_has_the_published_size(shape):
    """LeNet-5 on an effective 32×32 image: its weights, and two BN parameters per row instead of one bias."""
    model = build("lenet-bn", shape, 10, seed=0)
    weights = shape[0] * 6 * 25 + 6 * 16 * 25 + 400 * 120 + 120 * 84 + 84 * 10
    assert sum(p.numel() for p in model.parameters()) == weights + 2 * (6 + 16 + 120 + 84 + 10)


def test_lenet_logits_are_normalized():
    logits = build("lenet-bn", (1, 28, 28), 5, seed=0).double()(images((1, 28, 28), 64).double())
    assert torch.allclose(logits.mean(0), torch.zeros(5).double(), atol=1e-12)
    assert torch.allclose(logits.var(0, correction=0), torch.ones(5).double(), rtol=1e-3)


def test_vgg_initialisation_has_kaiming_variance():
    model = build("vgg11-bn", (3, 32, 32), 10, seed=0)
    weight = dict(model.named_parameters())["conv4_1.weight"]
    assert weight.var().item() == pytest.approx(2 / (512 * 9), rel=0.01)  # 1.2 M draws: six standard errors are 0.8%


@everything
def test_weights_are_a_function_of_the_seed_and_leave_the_global_state_alone(name, shape, options):
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    first = build(name, shape, 3, seed=4, **options).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(321)
    again, other = (build(name, shape, 3, seed=s, **options).state_dict() for s in (4, 5))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


@pytest.mark.parametrize(("name", "options", "count"), [
    ("resnet18", {}, 11_173_962), ("wideresnet", {"depth": 28, "width": 10}, 36_479_194), ("wideresnet", {}, 2_748_890),
])
def test_residual_networks_have_the_published_size(name, options, count):
    """36.5 M for WRN-28-10 and 2.7 M for WRN-16-4 in table 4 of Zagoruyko & Komodakis 2016."""
    with torch.device("meta"):
        model = MODELS[name].builder((3, 32, 32), 10, **options)
    assert sum(p.numel() for p in model.parameters()) == count


def test_the_size_of_residual_networks_is_that_of_their_tables():
    """Counted layer by layer: 9·in·out per convolution, in·out per projection, 2·channels per normalization."""
    wide, classes = [(16, 32), (32, 32), (32, 64), (64, 64), (64, 128), (128, 128)], 7
    expected = 9 * 2 * 16 + sum(9 * (i * o + o * o) + 2 * (i + o) + (i * o if i != o else 0) for i, o in wide)
    model = build("wideresnet", (2, 8, 8), classes, seed=0, depth=16, width=2)
    assert sum(p.numel() for p in model.parameters()) == expected + 2 * 128 + 128 * classes + classes
    post = [(8, 8), (8, 8), (8, 16), (16, 16), (16, 32), (32, 32), (32, 64), (64, 64)]
    expected = 9 * 8 + 2 * 8 + sum(9 * (i * o + o * o) + 4 * o + (i * o + 2 * o if i != o else 0) for i, o in post)
    model = build("resnet18", (1, 8, 8), classes, seed=0, width=0.125)
    assert sum(p.numel() for p in model.parameters()) == expected + 64 * classes + classes


def test_scale_groups_of_resnet18():
    """Every filter is normalized; (γ, β) before ReLU, convolution and BN are a group; what feeds the stream is none."""
    groups = scale_groups(build("resnet18", (1, 8, 8), 3, seed=0, width=0.05), images((1, 8, 8))).invariant
    blocks = [f"block{s}_{b}" for s in range(1, 5) for b in (1, 2)]
    filters = ["conv", *(f"{b}.conv{i}" for b in blocks for i in (1, 2)), *(f"block{s}_1.skip.conv" for s in (2, 3, 4))]
    affine = [f"{b}.norm1.{k}" for b in blocks for k in ("weight", "bias")]
    assert groups == {f"{name}.weight": "row" for name in filters} | dict.fromkeys(affine, "joint")


@pytest.mark.parametrize("width", [1, 2])
def test_scale_groups_of_wideresnet(width):
    """The first convolution of a block is normalized; the second and the projection go into the stream, which is not.

    At width 1 the first block keeps its shape: the stem feeds the stream and is no group, and that block's first
    normalization feeds its convolution alone.
    """
    model = build("wideresnet", (1, 8, 8), 3, seed=0, depth=16, width=width)
    groups = scale_groups(model, images((1, 8, 8))).invariant
    blocks = [f"block{s}_{b}" for s in (1, 2, 3) for b in (1, 2)]
    kept = [f"block{s}_2" for s in (1, 2, 3)] + (["block1_1"] if width == 1 else [])
    filters = [f"{b}.conv1.weight" for b in blocks] + (["conv.weight"] if width > 1 else [])
    affine = [f"{b}.norm1.{k}" for b in kept for k in ("weight", "bias")]
    assert groups == dict.fromkeys(filters, "row") | dict.fromkeys(affine, "joint")


@pytest.mark.parametrize(("name", "options"), [
    ("resnet18", {"width": 0.1}), ("wideresnet", {"depth": 10, "width": 1, "dropout": 0.1}),
])
def test_residual_networks_learn(name, options):
    model, x = build(name, (1, 8, 8), 3, seed=0, **options), images((1, 8, 8), 24)
    y = torch.arange(24) % 3
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(15):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_dropout_of_wideresnet_is_used_in_training_alone():
    model, x = build("wideresnet", (1, 8, 8), 3, seed=0, depth=10, width=1, dropout=0.5), images((1, 8, 8))
    plain = build("wideresnet", (1, 8, 8), 3, seed=0, depth=10, width=1)
    assert sum(isinstance(m, nn.Dropout) for m in model.modules()) == 3
    assert torch.equal(model.eval()(x), plain.eval()(x))
    model.train()
    with torch.random.fork_rng():
        assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize(("name", "shape"), [("lenet-bn", (1, 28, 28)), ("bn-mlp", (1, 4, 4))])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_option_is_used(name, shape, activation):
    kinds = {type(m) for m in build(name, shape, 2, seed=0, activation=activation)}
    assert kinds & {factory for factory in ACTIVATIONS.values()} == {ACTIVATIONS[activation]}


def test_registry_describes_every_model():
    for spec in MODELS.values():
        assert all(text and "\n" not in text for text in (spec.summary, spec.source))
    assert MODELS["bn-mlp"].options == {"width": 128, "depth": 2, "activation": "relu"}


@pytest.mark.parametrize(
    ("name", "shape", "classes", "options", "message"),
    [
        ("lenet", (1, 28, 28), 10, {}, "did you mean 'lenet-bn'"),
        ("zzz", (1, 28, 28), 10, {}, "bn-mlp, lenet-bn, vgg11-bn, conv-bn"),
        ("bn-mlp", (1, 8, 8), 10, {"widht": 3}, "did you mean 'width'"),
        ("conv-bn", (1, 8, 8), 10, {"depth": 3}, "expected one of width"),
        ("bn-mlp", (1, 8, 8), 10, {"width": 0}, "width=0"),
        ("bn-mlp", (1, 8, 8), 10, {"depth": 2.0}, r"depth=2\.0"),
        ("bn-mlp", (1, 8, 8), 10, {"width": True}, "width=True"),
        ("bn-mlp", (1, 8, 8), 10, {"activation": "gelu"}, "relu, tanh, softplus"),
        ("lenet-bn", (1, 28, 28), 10, {"pool": "mean"}, "max, avg"),
        ("lenet-bn", (1, 28, 28), 10, {"logits_bn": 1}, "logits_bn=1"),
        ("lenet-bn", (1, 8, 8), 10, {}, "at least 12×12"),
        ("lenet-bn", (1, 28, 11), 10, {}, "28×11"),
        ("vgg11-bn", (3, 28, 28), 10, {}, "at least 32×32"),
        ("vgg11-bn", (3, 32, 32), 10, {"width": float("nan")}, "width=nan"),
        ("resnet18", (3, 7, 32), 10, {}, "at least 8×8"),
        ("resnet18", (3, 32, 32), 10, {"width": 0}, "width=0"),
        ("wideresnet", (3, 32, 7), 10, {}, "at least 8×8"),
        ("wideresnet", (3, 32, 32), 10, {"depth": 20}, "16 or 22"),
        ("wideresnet", (3, 32, 32), 10, {"depth": 4}, "depth=4"),
        ("wideresnet", (3, 32, 32), 10, {"width": 1.5}, r"width=1\.5"),
        ("wideresnet", (3, 32, 32), 10, {"dropout": 1.0}, "dropout"),
        ("wideresnet", (3, 32, 32), 10, {"dropout": "much"}, "dropout"),
        ("bn-mlp", (8, 8), 10, {}, "channels, height, width"),
        ("bn-mlp", (1, 0, 8), 10, {}, "input_shape=0"),
        ("bn-mlp", (1, 8, 8), 0, {}, "classes=0"),
    ],
)
def test_bad_input_is_explained_in_one_line(name, shape, classes, options, message):
    with pytest.raises(InputError, match=message) as caught:
        build(name, shape, classes, seed=0, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("seed", [-1, 0.5, None])
def test_seed_must_be_a_nonnegative_integer(seed):
    with pytest.raises(InputError, match="seed"):
        build("conv-bn", (1, 8, 8), 2, seed=seed)
