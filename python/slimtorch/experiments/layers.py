# SPDX-License-Identifier: Apache-2.0
"""Layer by layer: ``slimtorch compare --network alexnet | vgg16 | resnet50``.

AlexNet is the comparison that the field still cites (Wen et al. 2016, "Learning Structured Sparsity in Deep Neural
Networks", 1608.03665, Table 4): l1 pruning without structure against structured sparsity learning (SSL), on the
authors' own pruned weights. The other two are shapes with masks drawn at random.
"""

from __future__ import annotations

import math
import statistics
import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from slimtorch.experiments import machine
from slimtorch.experiments.rivals import FROZEN, ONEDNN, TORCH, best_dense, dense_rivals
from slimtorch.measure import Latency, interleave, threads_of_torch
from slimtorch.models import ALEXNET, RESNET50, VGG16, LayerShape
from slimtorch.report import Table

SCHEMA = "slimtorch.layers/1"
WHOLE, MATMUL = "whole layer", "matmul only"
SHAPES = {"alexnet": ALEXNET, "vgg16": VGG16, "resnet50": RESNET50}
TITLES = {"alexnet": "AlexNet", "vgg16": "VGG-16", "resnet50": "ResNet-50"}
DEFAULT_WEIGHTS = Path("..") / "shared" / "data"  # beside the checkout

# Wen et al., Table 4: CPU speed-up of the lowered product alone, over dense GEMM (MKL, Xeon E5-2650).
WEN_L1 = {"conv1": 0.80, "conv2": 2.91, "conv3": 4.84, "conv4": 3.83, "conv5": 2.76}
WEN_SSL = {"conv1": 1.05, "conv2": 3.37, "conv3": 6.27, "conv4": 9.73, "conv5": 4.93}

# Share of zeros, zero rows and zero columns of the published files: what the random masks imitate without them.
_L1_SPARSITY = {"conv1": 0.596, "conv2": 0.886, "conv3": 0.951, "conv4": 0.939, "conv5": 0.908}
_SSL_SPARSITY = {
    "conv1": (0.348, 9, 0),
    "conv2": (0.840, 31, 481),
    "conv3": (0.942, 156, 1772),
    "conv4": (0.959, 177, 1250),
    "conv5": (0.881, 0, 1134),
}
# SSL leaves whole columns, so blocks one column wide fit it best; square ones are there for what they cost elsewhere.
_BLOCK_SIZES = ((16, 16), (8, 8), (16, 4), (16, 1), (32, 1))

Call = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class LayerTimes:
    """One layer in one kind of timing: runner -> latency; ``sparsity``: share of zeros of each weight used."""

    layer: str
    kind: str
    count: int
    sparsity: dict[str, float]
    latency: dict[str, Latency]


@dataclass(frozen=True)
class LayerComparison:
    """Times of every runner on every layer, and where the masks came from (``source``)."""

    network: str
    source: str
    batch: int
    machine: dict[str, object]
    times: list[LayerTimes]
    notes: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        return f"{TITLES[self.network]} ({self.source}), batch {self.batch}"

    def kinds(self) -> list[str]:
        return list(dict.fromkeys(entry.kind for entry in self.times))

    def layer_names(self) -> list[str]:
        return list(dict.fromkeys(entry.layer for entry in self.times))

    def contenders(self, kind: str) -> list[str]:
        """Runners that are no dense rival, in the order of their first appearance."""
        names = [name for entry in self.times if entry.kind == kind for name in entry.latency]
        return [name for name in dict.fromkeys(names) if name not in (TORCH, ONEDNN, FROZEN)]

    def speedup(self, kind: str, layer: str, contender: str, over: str = TORCH) -> float | None:
        """Time of dense torch (or of the best dense code, ``over="best"``) over the contender's; None if not timed."""
        for entry in self.times:
            if entry.kind == kind and entry.layer == layer and contender in entry.latency:
                reference = entry.latency[TORCH].median if over == TORCH else best_dense(entry.latency)
                return reference / entry.latency[contender].median
        return None

    def mean_speedup(self, kind: str, contender: str, over: str = TORCH) -> float:
        """Mean over the layers, as Wen et al. average."""
        values = [self.speedup(kind, layer, contender, over) for layer in self.layer_names()]
        return statistics.fmean(value for value in values if value is not None)

    def network_speedup(self, kind: str, contender: str, over: str = TORCH) -> float:
        """Time of all layers, each as often as the network has it, over the contender's."""
        reference = own = 0.0
        for entry in self.times:
            if entry.kind == kind and contender in entry.latency:
                dense = entry.latency[TORCH].median if over == TORCH else best_dense(entry.latency)
                reference += entry.count * dense
                own += entry.count * entry.latency[contender].median
        return reference / own

    # --- what it says -------------------------------------------------------------------------------------------------

    def tables(self) -> list[Table]:
        wide = self.network == "alexnet"
        return [self._wide(kind) if wide else self._tall(kind) for kind in self.kinds()]

    def _wide(self, kind: str) -> Table:
        """Layers as columns: as Table 4 of Wen et al. is laid out."""
        layers = self.layer_names()
        entries = {entry.layer: entry for entry in self.times if entry.kind == kind}
        rows: list[list[object]] = []
        for name, key in (("zeros %, l1", "l1"), ("zeros %, SSL", "SSL")):
            rows.append([name, *(f"{entries[layer].sparsity[key] * 100:.1f}" for layer in layers), ""])
        for name in (TORCH, ONEDNN, FROZEN, *self.contenders(kind)):
            times = [entries[layer].latency.get(name) for layer in layers]
            if any(times):
                rows.append([f"us: {name}", *("-" if t is None else _micro(t.median) for t in times), ""])
        for over, label in ((TORCH, "x torch"), ("best", "x best")):
            for name in self.contenders(kind):
                values = [self.speedup(kind, layer, name, over) for layer in layers]
                cells = ["-" if value is None else f"{value:.2f}" for value in values]
                rows.append([f"{label}: {name}", *cells, f"{self.mean_speedup(kind, name, over):.2f}"])
        for name, published in (("Wen et al.: l1", WEN_L1), ("Wen et al.: SSL", WEN_SSL)):
            rows.append(
                [name, *(f"{published[layer]:.2f}" for layer in layers), f"{statistics.fmean(published.values()):.2f}"]
            )
        return Table(f"{self.title}: {kind}", ["", *layers, "mean"], rows, [*self._notes(kind)])

    def _tall(self, kind: str) -> Table:
        """Layers as rows, one column per contender."""
        contenders = self.contenders(kind)
        rows: list[list[object]] = []
        for entry in self.times:
            if entry.kind != kind:
                continue
            row: list[object] = [entry.layer, entry.count, _micro(entry.latency[TORCH].median)]
            row.append(_micro(best_dense(entry.latency)))
            for name in contenders:
                ratio = self.speedup(kind, entry.layer, name, "best")
                row.append("-" if ratio is None else f"{ratio:.2f}")
            rows.append(row)
        for label, over in (("all, x best", "best"), ("all, x torch", TORCH)):
            rows.append(
                [label, None, "", "", *(f"{self.network_speedup(kind, name, over):.2f}" for name in contenders)]
            )
        return Table(
            f"{self.title}: {kind}", ["layer", "n", "torch us", "best us", *contenders], rows, self._notes(kind)
        )

    def _notes(self, kind: str) -> list[str]:
        rule = "best: the fastest of torch, oneDNN and frozen TorchScript. us: microseconds, median."
        if kind == MATMUL:
            rule += " The input is lowered (im2col) beforehand, as Wen et al. timed."
        return [rule, *self.notes, machine.headline(self.machine)]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; ``schema`` names this layout."""
        return {
            "schema": SCHEMA,
            "network": self.network,
            "source": self.source,
            "batch": self.batch,
            "machine": self.machine,
            "layers": [asdict(entry) for entry in self.times],
            "mean_speedup": {
                kind: {
                    name: {"torch": self.mean_speedup(kind, name), "best_dense": self.mean_speedup(kind, name, "best")}
                    for name in self.contenders(kind)
                }
                for kind in self.kinds()
            },
            "published": {"l1": WEN_L1, "SSL": WEN_SSL} if self.network == "alexnet" else {},
            "tables": [table.to_dict() for table in self.tables()],
        }


def _micro(seconds: float) -> str:
    value = seconds * 1e6
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


# --- weights ------------------------------------------------------------------------------------------------------


def load_alexnet(path: Path) -> dict[str, torch.Tensor]:
    """Weights conv1 … conv5 of a published file, float32 ``[out, in / groups, k, k]`` with their zeros.

    The file holds for each layer ``convN_values``, ``convN_columns`` and ``convN_row_offsets``: the rows of the weight
    seen as ``[out, in / groups * k * k]``, compressed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or an array is missing or does not fit AlexNet; names the array.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    weights = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: no readable .npz file ({error})") from error
    for shape in ALEXNET[:5]:
        names = [f"{shape.name}_{part}" for part in ("values", "columns", "row_offsets")]
        for name in names:
            if name not in arrays:
                raise ValueError(f"{path}: array {name!r} is missing")
        values, columns, offsets = (arrays[name] for name in names)
        rows, width = shape.c_out, shape.weights // shape.c_out
        counts = np.diff(offsets.astype(np.int64))
        if offsets.shape != (rows + 1,) or offsets[0] != 0 or offsets[-1] != len(values) or (counts < 0).any():
            raise ValueError(f"{path}: {names[2]}: expected {rows + 1} rising offsets from 0 to {len(values)}")
        if columns.shape != values.shape or (len(columns) and int(columns.max()) >= width):
            raise ValueError(f"{path}: {names[1]}: expected {len(values)} indices below {width}")
        dense = np.zeros((rows, width), np.float32)
        dense[np.repeat(np.arange(rows), counts), columns.astype(np.int64)] = values
        weights[shape.name] = torch.from_numpy(dense).reshape(shape.weight_shape)
    return weights


def alexnet_weights(path: Path | None) -> tuple[str, dict[str, dict[str, torch.Tensor]]]:
    """(where they come from, "l1" and "SSL" -> layer -> weight).

    ``path`` is the folder with ``alexnet_l1.npz`` and ``alexnet_ssl.npz``, or one of the two files. None looks into
    ``../shared/data`` and falls back to random masks of the same density where that is not there.

    Raises:
        FileNotFoundError, ValueError: a path was given and its files are not there or not readable.
    """
    folder = DEFAULT_WEIGHTS if path is None else path.parent if path.is_file() else path
    files = {"l1": folder / "alexnet_l1.npz", "SSL": folder / "alexnet_ssl.npz"}
    if path is None and not all(file.is_file() for file in files.values()):
        return "random masks", {"l1": _random_l1(), "SSL": _random_ssl()}
    return "real pruned weights", {kind: load_alexnet(file) for kind, file in files.items()}


def _random_l1() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {s.name: random_weight(s, _L1_SPARSITY[s.name], generator) for s in ALEXNET[:5]}


def _random_ssl() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for shape in ALEXNET[:5]:
        sparsity, zero_rows, zero_columns = _SSL_SPARSITY[shape.name]
        matrix = torch.randn(shape.c_out, shape.weights // shape.c_out, generator=generator)
        matrix[torch.randperm(matrix.shape[0], generator=generator)[:zero_rows]] = 0
        matrix[:, torch.randperm(matrix.shape[1], generator=generator)[:zero_columns]] = 0
        keep = (1 - sparsity) * matrix.numel() / max(1, int(torch.count_nonzero(matrix)))
        matrix[torch.rand(matrix.shape, generator=generator) >= keep] = 0
        weights[shape.name] = matrix.reshape(shape.weight_shape)
    return weights


def random_weight(
    shape: LayerShape, sparsity: float, generator: torch.Generator, block_size: tuple[int, int] = (1, 1)
) -> torch.Tensor:
    """Normal weights; each block of the matrix ``[out, rest]`` is zero with probability ``sparsity``."""
    rows, width = shape.c_out, shape.weights // shape.c_out
    r, c = block_size
    keep = torch.rand(-(-rows // r), -(-width // c), generator=generator) >= sparsity
    mask = keep.repeat_interleave(r, 0)[:rows].repeat_interleave(c, 1)[:, :width]
    return (torch.randn(rows, width, generator=generator) * mask / math.sqrt(width)).reshape(shape.weight_shape)


# --- runners ------------------------------------------------------------------------------------------------------


def _dense_layer(shape: LayerShape, weight: torch.Tensor) -> nn.Linear | nn.Conv2d:
    layer = shape.build()
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    layer.bias = None
    return layer.eval()


def _sparse(layer: nn.Linear | nn.Conv2d, x: torch.Tensor) -> Call:
    from slimtorch.nn import SparseConv2d, SparseLinear

    packed = SparseConv2d.from_dense(layer) if isinstance(layer, nn.Conv2d) else SparseLinear.from_dense(layer)
    return lambda: packed(x)


def _blocks(layer: nn.Linear | nn.Conv2d, x: torch.Tensor, block_size: tuple[int, int]) -> Call:
    from slimtorch.nn import BlockSparseConv2d, BlockSparseLinear

    kind = BlockSparseConv2d if isinstance(layer, nn.Conv2d) else BlockSparseLinear
    packed = kind.from_dense(layer, block_size=block_size)  # type: ignore[arg-type]
    return lambda: packed(x)


def _fastest(calls: dict[Any, Call]) -> Any:
    """The key of the fastest of a few calls, found by a short race."""
    times = interleave(calls, samples=3)
    return min(times, key=lambda key: times[key].median)


def _csr(shape: LayerShape, weight: torch.Tensor) -> list[torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its CSR layout a beta on first use
        return [part.flatten(1).to_sparse_csr() for part in weight.chunk(shape.groups)]


def _csr_whole(shape: LayerShape, weight: torch.Tensor, x: torch.Tensor) -> Call:
    parts = _csr(shape, weight)

    def call() -> torch.Tensor:
        columns = F.unfold(
            x, shape.kernel, padding=shape.padding, stride=shape.stride
        )  # [batch, groups * k, positions]
        outputs = [
            torch.cat([part @ lowered for part, lowered in zip(parts, image.chunk(shape.groups), strict=True)])
            for image in columns
        ]
        return torch.stack(outputs).unflatten(-1, (shape.out_height, shape.out_height))

    return call


@dataclass(frozen=True)
class _Rest:
    """SSL's dense rest of one group: kept rows and columns of its weight and the weight between them."""

    rows: torch.Tensor
    columns: torch.Tensor
    weight: torch.Tensor


def _rests(shape: LayerShape, weight: torch.Tensor) -> list[_Rest]:
    rests = []
    for part in weight.flatten(1).chunk(shape.groups):
        rows, columns = (part != 0).any(1).nonzero()[:, 0], (part != 0).any(0).nonzero()[:, 0]
        rests.append(_Rest(rows, columns, part[rows][:, columns].contiguous()))
    return rests


def _ssl_whole(shape: LayerShape, weight: torch.Tensor, x: torch.Tensor) -> Call:
    """SSL as its authors ran it: lower the kept columns only, multiply densely, put the rows where they belong.

    The lowering is one gather from the padded input; where that is slower than lowering all and selecting, the latter.
    """
    rests = _rests(shape, weight)
    batch, size, positions = x.shape[0], shape.height + 2 * shape.padding, shape.out_height**2
    taps, per_group = shape.kernel**2, shape.c_in // shape.groups
    start = torch.arange(shape.out_height) * shape.stride
    window = (start[:, None] * size + start).flatten()  # [positions]: upper left corner of each window
    gathers = []
    for group, rest in enumerate(rests):
        channel, tap = rest.columns // taps + group * per_group, rest.columns % taps
        corner = channel * size * size + (tap // shape.kernel) * size + tap % shape.kernel
        gathers.append((corner[:, None] + window).flatten())
    rows = torch.cat([rest.rows + group * (shape.c_out // shape.groups) for group, rest in enumerate(rests)])
    complete = len(rows) == shape.c_out
    all_columns = torch.cat([rest.columns + group * per_group * taps for group, rest in enumerate(rests)])
    counts = [len(rest.columns) for rest in rests]

    def finish(lowered: Sequence[torch.Tensor]) -> torch.Tensor:
        product = torch.cat([rest.weight @ part for rest, part in zip(rests, lowered, strict=True)], dim=-2)
        if not complete:
            product = product.new_zeros(batch, shape.c_out, positions).index_copy_(1, rows, product)
        return product.unflatten(-1, (shape.out_height, shape.out_height))

    def by_gather() -> torch.Tensor:
        padded = F.pad(x, (shape.padding,) * 4).flatten(1)
        return finish([padded.index_select(1, index).view(batch, -1, positions) for index in gathers])

    def by_selection() -> torch.Tensor:
        lowered = F.unfold(x, shape.kernel, padding=shape.padding, stride=shape.stride)
        return finish(lowered.index_select(1, all_columns).split(counts, 1))

    calls: dict[Any, Call] = {0: by_gather, 1: by_selection}
    return calls[_fastest(calls)]


def _lowered(shape: LayerShape, x: torch.Tensor) -> torch.Tensor:
    """The lowered input of all groups, ``[groups * k, batch * positions]``, contiguous."""
    columns = F.unfold(x, shape.kernel, padding=shape.padding, stride=shape.stride)
    return columns.transpose(0, 1).flatten(1).contiguous()


# --- the jobs -----------------------------------------------------------------------------------------------------

Progress = Callable[[str, int, int], None]


def _silent(stage: str, done: int, total: int) -> None:
    """No progress shown."""


def _check(name: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    worst, scale = float((got - expected).abs().max()), float(expected.abs().max())
    if got.shape != expected.shape or not worst <= 1e-3 * max(scale, 1e-6):
        raise RuntimeError(f"{name} gives another result than dense torch (off by {worst:.3g} of {scale:.3g})")


def compare_alexnet(
    weights: Path | None = None, *, batch: int = 1, samples: int = 21, threads: int = 1, progress: Progress = _silent
) -> LayerComparison:
    """conv1 … conv5 as in Table 4 of Wen et al.: whole layer, and the product on the lowered input alone.

    Args:
        weights: see :func:`alexnet_weights`.
        batch: images.
        samples: rounds of timing.
        threads: of torch.
        progress: told (stage, layers done, layers in all).
    """
    source, found = alexnet_weights(weights)
    times: list[LayerTimes] = []
    chosen: dict[str, dict[str, tuple[int, int]]] = {WHOLE: {}, MATMUL: {}}
    shapes = ALEXNET[:5]
    with threads_of_torch(threads), torch.inference_mode():
        for index, shape in enumerate(shapes):
            progress("timing AlexNet", index, len(shapes))
            l1, ssl = found["l1"][shape.name], found["SSL"][shape.name]
            sparsity = {key: 1 - float(torch.count_nonzero(w)) / w.numel() for key, w in (("l1", l1), ("SSL", ssl))}
            x = torch.randn(shape.input_shape(batch), generator=torch.Generator().manual_seed(index))
            for kind, (calls, size) in (
                (WHOLE, _whole_calls(shape, l1, ssl, x)),
                (MATMUL, _matmul_calls(shape, l1, ssl, x)),
            ):
                chosen[kind][shape.name] = size
                times.append(LayerTimes(shape.name, kind, 1, sparsity, interleave(calls, samples=samples)))
        progress("timing AlexNet", len(shapes), len(shapes))
        facts = machine.describe(threads)
    sizes = ", ".join(f"{layer} {r}x{c}" for layer, (r, c) in chosen[WHOLE].items())
    ours = (
        f"{source}; ours: slimtorch, blocks: the fastest size for SSL's weights ({sizes}). MKL CSR: torch's csr @ "
        "lowered input. SSL dense rest: zero rows and columns removed, as its authors ran it."
    )
    wen = (
        "Wen et al.: their published CPU figures, product alone, other weights of the same kind (zeros l1 67.6 / 92.4 "
        "/ 97.2 / 96.6 / 94.3 %)."
    )
    return LayerComparison("alexnet", source, batch, facts, times, [ours, wen])


def _whole_calls(
    shape: LayerShape, l1: torch.Tensor, ssl: torch.Tensor, x: torch.Tensor
) -> tuple[dict[str, Call], tuple[int, int]]:
    """Runner -> call of the whole convolution, and the block size chosen for SSL; every result is checked."""
    layers = {"l1": _dense_layer(shape, l1), "SSL": _dense_layer(shape, ssl)}
    expected = {key: layer(x) for key, layer in layers.items()}
    size = _fastest({size: _blocks(layers["SSL"], x, size) for size in _BLOCK_SIZES})
    ours = {
        "ours, l1": (_sparse(layers["l1"], x), "l1"),
        "ours, SSL": (_sparse(layers["SSL"], x), "SSL"),
        "ours, SSL blocks": (_blocks(layers["SSL"], x, size), "SSL"),
        "MKL CSR, l1": (_csr_whole(shape, l1, x), "l1"),
        "SSL dense rest": (_ssl_whole(shape, ssl, x), "SSL"),
    }
    for name, (call, key) in ours.items():
        _check(f"{shape.name}, {name}", call(), expected[key])
    return {**dense_rivals(layers["l1"], x), **{name: call for name, (call, _) in ours.items()}}, size


def _matmul_calls(
    shape: LayerShape, l1: torch.Tensor, ssl: torch.Tensor, x: torch.Tensor
) -> tuple[dict[str, Call], tuple[int, int]]:
    """Runner -> call of weight @ lowered input ``[groups * k, positions]``, as :func:`_whole_calls`.

    A packed 1x1 convolution over the lowered input is this very product, in the same layout.
    """
    lowered = _lowered(shape, x)
    image = lowered[None, :, None, :]  # [1, groups * k, 1, positions]
    width = lowered.shape[0] // shape.groups
    product = LayerShape(shape.name, shape.c_out, lowered.shape[0], 1, groups=shape.groups)
    layers = {key: _dense_layer(product, w.reshape(-1, width, 1, 1)) for key, w in (("l1", l1), ("SSL", ssl))}

    def dense(weight: torch.Tensor) -> Call:
        parts, inputs = (
            [part.flatten(1).contiguous() for part in weight.chunk(shape.groups)],
            lowered.chunk(shape.groups),
        )
        return lambda: torch.cat([part @ given for part, given in zip(parts, inputs, strict=True)])

    expected = {"l1": dense(l1)(), "SSL": dense(ssl)()}
    calls: dict[str, Call] = {TORCH: dense(l1)}
    for name, call in dense_rivals(layers["l1"], image).items():
        if name != TORCH:
            calls[name] = call
    csr, inputs = _csr(shape, l1), lowered.chunk(shape.groups)
    rests = _rests(shape, ssl)
    kept = [given[rest.columns].contiguous() for rest, given in zip(rests, inputs, strict=True)]
    size = _fastest({size: _blocks(layers["SSL"], image, size) for size in _BLOCK_SIZES})
    calls["ours, l1"] = _sparse(layers["l1"], image)
    calls["ours, SSL"] = _sparse(layers["SSL"], image)
    calls["ours, SSL blocks"] = _blocks(layers["SSL"], image, size)
    calls["MKL CSR, l1"] = lambda: torch.cat([part @ given for part, given in zip(csr, inputs, strict=True)])
    for name, call in calls.items():
        _check(f"{shape.name}, {name}", call().reshape(shape.c_out, -1), expected["SSL" if "SSL" in name else "l1"])
    # As published: the product of what is left, its rows not put back.
    calls["SSL dense rest"] = lambda: torch.cat([rest.weight @ given for rest, given in zip(rests, kept, strict=True)])
    return calls, size


def compare_shapes(
    network: str,
    sparsities: Sequence[float] = (0.8, 0.9, 0.95),
    *,
    batch: int = 1,
    samples: int = 7,
    threads: int = 1,
    progress: Progress = _silent,
) -> LayerComparison:
    """All distinct layers of VGG-16 or ResNet-50 with masks drawn at random: unstructured, and 16x16 blocks.

    Raises:
        ValueError: an unknown network, or a sparsity outside (0, 1).
    """
    if network not in ("vgg16", "resnet50"):
        raise ValueError(f"network: expected 'vgg16' or 'resnet50', got {network!r}")
    for value in sparsities:
        if not 0 < value < 1:
            raise ValueError(f"sparsities: expected shares between 0 and 1, got {value}")
    shapes, stage = SHAPES[network], f"timing {TITLES[network]}"
    times: list[LayerTimes] = []
    with threads_of_torch(threads), torch.inference_mode():
        for index, shape in enumerate(shapes):
            progress(stage, index, len(shapes))
            generator = torch.Generator().manual_seed(index)
            x = torch.randn(shape.input_shape(batch), generator=generator)
            calls = dict(dense_rivals(_dense_layer(shape, random_weight(shape, 0.0, generator)), x))
            sparsity = {}
            for value in sparsities:
                for name, block_size in (("sparse", (1, 1)), ("blocks", (16, 16))):
                    layer = _dense_layer(shape, random_weight(shape, value, generator, block_size))
                    call = _sparse(layer, x) if name == "sparse" else _blocks(layer, x, block_size)
                    key = f"{name} {value * 100:g}%"
                    _check(f"{shape.name}, {key}", call(), layer(x))
                    calls[key] = call
                    sparsity[key] = 1 - float(torch.count_nonzero(layer.weight)) / layer.weight.numel()
            times.append(LayerTimes(shape.name, WHOLE, shape.count, sparsity, interleave(calls, samples=samples)))
        progress(stage, len(shapes), len(shapes))
        facts = machine.describe(threads)
    notes = ["Random masks: no trained network. Layer columns: speed-up over the best dense code; blocks are 16x16."]
    return LayerComparison(network, "random masks", batch, facts, times, notes)
