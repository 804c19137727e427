# SPDX-License-Identifier: Apache-2.0
"""save and load: the same bits in the same layers, every format on every layer, and models as methods leave them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import slimtorch as slim
from slimtorch.models import resnet18
from slimtorch.nn import PackedLayer
from slimtorch.storage._encodings import DTYPES
from tests.storage.fuzz import same_bits

N = slim.nn
FORMATS = {
    "sparse": (N.SparseLinear, N.SparseConv2d, {}),
    "sparse relu": (N.SparseLinear, N.SparseConv2d, {"activation": "relu"}),
    "block_sparse": (N.BlockSparseLinear, N.BlockSparseConv2d, {"block_size": (4, 16)}),
    "codebook": (N.CodebookLinear, N.CodebookConv2d, {"bits": 4}),
    "codebook zero": (N.CodebookLinear, N.CodebookConv2d, {"bits": 3, "zero": True, "group_size": 8}),
    "codebook 8": (N.CodebookLinear, N.CodebookConv2d, {"bits": 8, "group_size": "row"}),
    "sparse_codebook": (N.SparseCodebookLinear, N.SparseCodebookConv2d, {"bits": 4}),
    "sparse_codebook row": (N.SparseCodebookLinear, N.SparseCodebookConv2d, {"bits": 2, "group_size": "row"}),
    "binary": (N.BinaryLinear, N.BinaryConv2d, {}),
    "binary weights": (N.BinaryLinear, N.BinaryConv2d, {"binarize_input": False, "scale": False}),
}
each_format = pytest.mark.parametrize("name", FORMATS)
each_way = pytest.mark.parametrize("compress", [False, True], ids=["plain", "compressed"])


def sparsify(layer, density=0.3):
    with torch.no_grad():
        layer.weight.mul_(torch.rand_like(layer.weight) < density)
    return layer


def reload(model, fresh, tmp_path, compress=True):
    path = tmp_path / "model.slim"
    slim.save(model, path, compress=compress)
    return slim.load(path, fresh)


def linear(bias=True):
    return nn.Linear(97, 61, bias=bias)


def conv(bias=True):
    return nn.Conv2d(12, 20, (3, 2), stride=(1, 2), padding=(1, 0), dilation=(2, 1), groups=2, bias=bias)


@each_format
@each_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("build", "shape"), [(linear, (5, 97)), (conv, (2, 12, 9, 10))], ids=["linear", "conv2d"])
def test_every_format_on_every_layer_to_the_bit(name, compress, dtype, build, shape, tmp_path):
    torch.manual_seed(0)
    own = FORMATS[name][0 if build is linear else 1]
    model = own.from_dense(sparsify(build()).to(dtype), **FORMATS[name][2])
    x = torch.randn(shape).to(dtype)
    fresh = build()
    loaded = reload(model, fresh, tmp_path, compress)
    assert loaded is fresh
    assert type(loaded) is own
    assert repr(loaded) == repr(model)
    assert same_bits(loaded.state_dict(), model.state_dict())
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]


@each_format
def test_loads_into_a_packed_layer_too_and_trains(name, tmp_path):
    torch.manual_seed(0)
    own, options = FORMATS[name][0], FORMATS[name][2]
    model = own.from_dense(sparsify(linear(bias=False)), **options)
    loaded = reload(model, N.SparseLinear(97, 61, bias=False), tmp_path)
    assert type(loaded) is own
    assert same_bits(loaded.state_dict(), model.state_dict())
    x = torch.randn(3, 97, requires_grad=True)
    y = torch.randn(3, 97, requires_grad=True)
    with torch.no_grad():
        y.copy_(x)
    loaded(x).sum().backward()
    model(y).sum().backward()
    assert torch.equal(x.grad, y.grad)


def patterns(dtype):
    """Every sort of bit pattern that the dtype has: NaN with payloads, both zeros, infinities, denormals."""
    torch.manual_seed(1)
    bits = torch.randint(0, 256, (64 * dtype.itemsize,), dtype=torch.uint8)
    bits[: 8 * dtype.itemsize] = 0
    bits[8 * dtype.itemsize : 16 * dtype.itemsize] = 255
    bits[dtype.itemsize - 1] = 128
    return bits % 2 if dtype == torch.bool else bits.view(dtype)


class Holder(nn.Module):
    def __init__(self, *tensors):
        super().__init__()
        for index, tensor in enumerate(tensors):
            if tensor.is_floating_point() or tensor.is_complex():
                self.register_parameter(f"p{index}", nn.Parameter(tensor))
            else:
                self.register_buffer(f"b{index}", tensor)

    def blank(self):
        """The same shapes and dtypes, other bits."""
        return Holder(*[torch.ones(t.shape, dtype=torch.uint8).to(t.dtype) for t in self.state_dict().values()])


@each_way
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype_to_the_bit(dtype, compress, tmp_path):
    tensor = patterns(dtype).to(dtype) if dtype == torch.bool else patterns(dtype)
    few = tensor[torch.arange(512) % 16]
    sparse = torch.zeros(4096, dtype=torch.uint8).view(dtype)[: 4096 // dtype.itemsize].clone()
    sparse[::37] = tensor[: len(sparse[::37])] if len(sparse[::37]) <= 64 else tensor.repeat(8)[: len(sparse[::37])]
    model = Holder(
        tensor.reshape(8, 8), tensor[5], tensor[:0], few.reshape(2, 256), sparse, tensor.reshape(8, 8).t(),
        few[:1].expand(300),
    )  # fmt: skip
    assert same_bits(reload(model, model.blank(), tmp_path, compress).state_dict(), model.state_dict())


@pytest.mark.parametrize("density", [0.0, 0.001, 0.02, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (300, 7), (70, 701), (0, 5), (5, 0)], ids=str)
@each_way
def test_gaps_of_every_width(density, shape, compress, tmp_path):
    torch.manual_seed(2)
    dense = nn.Linear(shape[1], shape[0]) if all(shape) else nn.Linear(shape[1], shape[0], bias=False)
    sparsify(dense, density)
    for own in (N.SparseLinear, N.SparseCodebookLinear):
        model = own.from_dense(dense)
        loaded = reload(model, copy.deepcopy(dense), tmp_path, compress)
        assert same_bits(loaded.state_dict(), model.state_dict())
        assert type(loaded) is own


def test_compressing_pays(tmp_path):
    torch.manual_seed(0)
    dense = sparsify(nn.Linear(784, 300), 0.08)
    for own, times in ((N.SparseLinear, 5), (N.SparseCodebookLinear, 35)):
        model = own.from_dense(dense)
        plain = slim.save(model, tmp_path / "plain.slim", compress=False)
        small = slim.save(model, tmp_path / "small.slim")
        assert small == (tmp_path / "small.slim").stat().st_size
        assert small < plain
        assert small * times < 4 * (784 * 300 + 300)
    assert float(torch.signbit(dense.weight[dense.weight == 0]).float().mean()) > 0.4  # half of the zeros are -0.0
    assert slim.save(dense, tmp_path / "signed.slim") * 7 < 4 * (784 * 300 + 300)
    with torch.no_grad():
        dense.weight += 0.0
    assert slim.save(dense, tmp_path / "zeros.slim") * 9 < 4 * (784 * 300 + 300)


# --- models -------------------------------------------------------------------------------------------------------


def convert(model, choose):
    """Every Linear and Conv2d replaced by what `choose(index, layer)` makes of it."""
    layers = [(m, k) for m in model.modules() for k, c in m._modules.items() if type(c) in (nn.Linear, nn.Conv2d)]
    for index, (parent, key) in enumerate(layers):
        parent._modules[key] = choose(index, parent._modules[key])
    return model


@each_way
def test_channel_pruned_and_clustered_resnet(compress, tmp_path):
    torch.manual_seed(0)
    model = resnet18(classes=10, width=8)
    x = torch.randn(2, 3, 32, 32)
    model(x)  # running statistics
    slim.prune_(model, slim.prune.Neurons(ratio=0.4), example_inputs=x)
    makers = list(FORMATS.values())

    def choose(index, layer):
        linear_class, conv_class, options = makers[index % len(makers)]
        own = linear_class if isinstance(layer, nn.Linear) else conv_class
        return own.from_dense(sparsify(layer, 0.5), **options)

    convert(model, choose).eval()
    fresh = resnet18(classes=10, width=8).eval()
    before = list(fresh.modules())
    loaded = reload(model, fresh, tmp_path, compress)
    assert list(loaded.modules()) == before  # the same objects
    assert same_bits(loaded.state_dict(), model.state_dict())
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    assert {type(m) for m in loaded.modules() if isinstance(m, PackedLayer)} >= {N.CodebookConv2d, N.BinaryConv2d}
    assert [repr(m) for m in loaded.modules()] == [repr(m) for m in model.modules()]
    kept = sum(p.numel() for p in resnet18(classes=10, width=8).parameters()) * 4
    assert (tmp_path / "model.slim").stat().st_size < kept / 2


def test_channel_pruned_dense_model_with_groups(tmp_path):
    def build():
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.PReLU(16), nn.Conv2d(16, 16, 3, groups=16), nn.BatchNorm2d(16),
            nn.ConvTranspose2d(16, 8, 2, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(8),
            nn.Linear(8, 5),
        )  # fmt: skip

    model = build().eval()
    x = torch.randn(2, 3, 12, 12)
    slim.prune_(model, slim.prune.Neurons(ratio=0.5), example_inputs=x)
    assert model[3].groups < 16
    loaded = reload(model, build().eval(), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    assert repr(loaded) == repr(model)


def test_masks_are_baked_into_the_file_and_stay_in_the_model(tmp_path):
    torch.manual_seed(0)

    def build():
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    model = build()
    slim.prune_(model, slim.prune.Magnitude(sparsity=0.9))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    loaded = reload(model, build(), tmp_path)
    assert same_bits(model.state_dict(), state)
    assert torch.nn.utils.parametrize.is_parametrized(model[0])
    x = torch.randn(3, 64)
    assert torch.equal(loaded(x), model(x))
    assert type(loaded[0]) is nn.Linear
    assert int(torch.count_nonzero(loaded[0].weight)) == int(torch.count_nonzero(model[0].weight))


def test_transformer_and_lstm(tmp_path):
    def build():
        return nn.ModuleDict({
            "t": nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), "l": nn.LSTM(16, 8), "e": nn.Embedding(9, 16),
        })  # fmt: skip

    model = build().eval()
    loaded = reload(model, build().eval(), tmp_path)
    x = torch.randint(0, 9, (2, 5))
    with torch.no_grad():
        a, b = (m["l"](m["t"](m["e"](x)))[0] for m in (model, loaded))
    assert torch.equal(a, b)


class Tied(nn.Module):
    def __init__(self, tied=True):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        if tied:
            self.b.weight = self.a.weight
            self.c = self.a

    def forward(self, x):
        return self.c(self.b(self.a(x)))


def test_shared_tensors_are_stored_once_and_tied_again(tmp_path):
    model = Tied()
    size = slim.save(model, tmp_path / "tied.slim", compress=False)
    assert size < slim.save(Tied(tied=False), tmp_path / "untied.slim", compress=False) - 8 * 8 * 4
    for fresh in (Tied(), Tied(tied=False)):  # tied by the model's own class, or by the file
        loaded = slim.load(tmp_path / "tied.slim", fresh)
        assert loaded.a.weight is loaded.b.weight is loaded.c.weight
        assert loaded.a.bias is loaded.c.bias
        assert loaded.a.bias is not loaded.b.bias
        assert same_bits(loaded.state_dict(), model.state_dict())


def test_what_is_not_shared_in_the_file_is_not_shared_after_it(tmp_path):
    model = Tied(tied=False)
    half = Tied(tied=False)
    half.b.weight = half.a.weight
    loaded = reload(model, half, tmp_path)
    assert loaded.a.weight is not loaded.b.weight
    assert same_bits(loaded.state_dict(), model.state_dict())
    with pytest.raises(slim.FormatError, match="'c' and 'a' are one layer in the model"):
        slim.load(tmp_path / "model.slim", Tied())


def test_packed_layers_that_share_a_weight_share_it_again(tmp_path):
    torch.manual_seed(0)

    def build():
        return nn.ModuleList([nn.Linear(20, 20), nn.Linear(20, 20)])

    dense = build()
    sparsify(dense[0])
    dense[1].weight = dense[0].weight
    held = slim.formats.Sparse.pack(dense[0].weight)
    model = nn.ModuleList([N.SparseLinear.from_format(layer, held) for layer in dense])
    model[1].values = model[0].values
    loaded = reload(model, build(), tmp_path)
    assert loaded[0].values is loaded[1].values
    assert loaded[0].columns.data_ptr() == loaded[1].columns.data_ptr()
    x = torch.randn(2, 20)
    for ours, theirs in zip(loaded, model, strict=True):
        assert torch.equal(ours(x), theirs(x))


def test_modules_parameters_hooks_and_attributes_stay(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(N.SparseLinear.from_dense(sparsify(nn.Linear(8, 8))), nn.Linear(8, 8))
    fresh = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    fresh[0].note = "mine"
    fresh[0].bias.requires_grad_(False)
    fresh[0].register_buffer("scratch", torch.zeros(2), persistent=False)
    fresh[1].weight.requires_grad_(False)
    calls = []
    fresh[0].register_forward_hook(lambda *_: calls.append(1))
    layers, kept = list(fresh), [fresh[0].bias, fresh[1].weight, fresh[1].bias]
    loaded = reload(model, fresh.eval(), tmp_path)
    assert list(loaded) == layers
    assert all(a is b for a, b in zip([loaded[0].bias, loaded[1].weight, loaded[1].bias], kept, strict=True))
    assert [p.requires_grad for p in loaded.parameters()] == [True, False, False, True]
    assert not loaded[0].training
    loaded(torch.randn(2, 8))
    assert calls == [1]
    assert loaded[0].note == "mine"
    assert loaded[0].scratch.shape == (2,)
    assert "weight" not in loaded[0]._parameters
    assert not hasattr(loaded[0], "parametrizations")
    assert same_bits(loaded.state_dict(), model.state_dict())


def test_saved_twice_and_through_other_means(tmp_path):
    torch.manual_seed(0)
    model = N.SparseCodebookLinear.from_dense(sparsify(nn.Linear(40, 30)))
    slim.save(model, tmp_path / "a.slim")
    loaded = slim.load(str(tmp_path / "a.slim"), nn.Linear(40, 30))
    slim.save(loaded, tmp_path / "b.slim")
    assert (tmp_path / "a.slim").read_bytes() == (tmp_path / "b.slim").read_bytes()
    assert same_bits(copy.deepcopy(loaded).state_dict(), model.state_dict())
    assert same_bits(loaded.to(torch.float64).state_dict(), model.to(torch.float64).state_dict())


class Training(nn.Linear):
    """A layer of some training method, which knows what it packs into."""

    def packed(self):
        twin = nn.Linear(self.in_features, self.out_features)
        twin.load_state_dict(self.state_dict())
        return N.BinaryLinear.from_dense(twin)


def test_a_module_that_packs_itself_is_stored_packed(tmp_path):
    model = nn.Sequential(Training(8, 4))
    loaded = reload(model, nn.Sequential(nn.Linear(8, 4)), tmp_path)
    assert type(loaded[0]) is N.BinaryLinear
    x = torch.randn(3, 8)
    assert torch.equal(loaded(x), model[0].packed()(x))
    with pytest.raises(ValueError, match="layer '0' is a Training, set up for training"):
        slim.load(tmp_path / "model.slim", model)


# --- what cannot be saved, what does not fit ----------------------------------------------------------------------


def unsaveable():
    stranger = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    extra = type("Extra", (nn.Linear,), {"get_extra_state": lambda self: {"x": 1}})(4, 4)
    broken = N.SparseLinear.from_dense(nn.Linear(4, 4))
    broken.columns[0] = 99
    beside = N.SparseLinear.from_dense(nn.Linear(4, 4))
    beside.register_buffer("more", torch.zeros(1))
    layout = Holder(torch.zeros(2, dtype=torch.uint8))
    layout.b0 = torch.eye(3).to_sparse()
    return [
        (stranger, ValueError, "layer '0' is parametrized by _WeightNorm"),
        (nn.Sequential(extra), ValueError, "layer '0' keeps state that is no tensor"),
        (nn.Sequential(broken), ValueError, "layer '0' cannot be saved: columns"),
        (nn.Sequential(beside), ValueError, r"layer '0' has tensors beside its format: \['more'\]"),
        (layout, ValueError, "'b0' is a torch.sparse_coo tensor"),
        (nn.Sequential(nn.LazyLinear(4)), ValueError, "'0.weight' has no shape yet"),
        (nn.Linear(4, 4, device="meta"), ValueError, "'weight' is on the meta device"),
        (torch.zeros(3), TypeError, "model: expected a torch.nn.Module, got Tensor"),
    ]


@pytest.mark.parametrize(("model", "error", "message"), unsaveable(), ids=lambda v: v if isinstance(v, str) else "")
def test_what_a_file_cannot_hold(model, error, message, tmp_path):
    (tmp_path / "model.slim").write_bytes(b"old")
    with pytest.raises(error, match=message):
        slim.save(model, tmp_path / "model.slim")
    assert (tmp_path / "model.slim").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def packed_net():
    torch.manual_seed(0)
    return nn.Sequential(
        N.SparseConv2d.from_dense(sparsify(nn.Conv2d(3, 4, 3, stride=2))), nn.BatchNorm2d(4), nn.Flatten(),
        N.CodebookLinear.from_dense(nn.Linear(16, 5)),
    )  # fmt: skip


def dense_net(**changed):
    parts = {
        "conv": nn.Conv2d(3, 4, 3, stride=2), "norm": nn.BatchNorm2d(4), "flat": nn.Flatten(), "out": nn.Linear(16, 5),
    }  # fmt: skip
    return nn.Sequential(*{**parts, **changed}.values())


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


MISFITS = [
    (dense_net(more=nn.Linear(2, 2)), "the model has '4', which the file lacks"),
    (dense_net(out=nn.ReLU()), "the file has '3', which the model lacks"),
    (dense_net(conv=nn.Conv2d(3, 4, 3)), r"stride: the file has \[2, 2\], the model \[1, 1\]"),
    (dense_net(conv=nn.Conv2d(3, 4, 3, stride=2, bias=False)), "the model 'weight'"),
    (dense_net(conv=nn.Conv2d(3, 3, 3, stride=2)), "out_channels: expected at most 3, got 4"),
    (dense_net(norm=nn.GroupNorm(2, 4)), "the file has a BatchNorm, the model a GroupNorm"),
    (dense_net(norm=nn.BatchNorm2d(3)), "num_features: expected at most 3, got 4"),
    (dense_net(norm=nn.BatchNorm2d(4, affine=False)), "layers"),
    (dense_net(norm=N.SparseLinear(4, 4)), "the file has a BatchNorm, the model a Linear"),
    (dense_net(out=OwnForward(16, 5)), "OwnForward computes in its own way"),
    (dense_net(out=nn.Linear(15, 5)), "in_features: expected at most 15, got 16"),
    (nn.Linear(3, 3), "the file has '0', '1', '3', which the model lacks; the model has ''"),
]


@pytest.mark.parametrize(("model", "message"), MISFITS, ids=lambda v: v if isinstance(v, str) else "")
def test_a_file_for_another_model_is_refused_and_the_model_stays(model, message, tmp_path):
    slim.save(packed_net(), tmp_path / "model.slim")
    slim.load(tmp_path / "model.slim", dense_net())  # fits
    state = copy.deepcopy(model.state_dict())
    shown, parameters = repr(model), list(model.parameters())
    with pytest.raises(slim.FormatError, match=message) as raised:
        slim.load(tmp_path / "model.slim", model)
    assert str(raised.value).startswith(str(tmp_path / "model.slim"))
    assert isinstance(raised.value, ValueError)
    assert repr(model) == shown
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert same_bits(model.state_dict(), state)


def test_dense_file_into_a_packed_model_is_refused(tmp_path):
    slim.save(nn.Linear(4, 4), tmp_path / "model.slim")
    with pytest.raises(slim.FormatError, match="the file has a dense weight, the model a SparseLinear"):
        slim.load(tmp_path / "model.slim", N.SparseLinear(4, 4))


def test_masked_model_is_no_target(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8))
    slim.save(model, tmp_path / "model.slim")
    slim.prune_(model, slim.prune.Magnitude(sparsity=0.5))
    with pytest.raises(ValueError, match="expected a fresh dense model; layer '0'"):
        slim.load(tmp_path / "model.slim", model)


def test_bad_arguments(tmp_path):
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got type"):
        slim.load(tmp_path / "model.slim", nn.Linear)
    with pytest.raises(FileNotFoundError):
        slim.load(tmp_path / "none.slim", nn.Linear(2, 2))
    with pytest.raises(FileNotFoundError):
        slim.save(nn.Linear(2, 2), tmp_path / "no folder" / "model.slim")


class Slotted(nn.Linear):
    __slots__ = ("place",)  # python refuses to make another class of it


def test_a_failing_commit_is_undone(tmp_path):
    slim.save(packed_net(), tmp_path / "model.slim")
    model = dense_net()
    model[3] = Slotted(16, 5)
    state, shown, layers = copy.deepcopy(model.state_dict()), repr(model), [(type(m), m.__dict__) for m in model]
    with pytest.raises(TypeError, match="layout"):
        slim.load(tmp_path / "model.slim", model)
    assert all(type(m) is kind and m.__dict__ is own for m, (kind, own) in zip(model, layers, strict=True))
    assert repr(model) == shown
    assert same_bits(model.state_dict(), state)
