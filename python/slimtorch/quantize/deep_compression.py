# SPDX-License-Identifier: Apache-2.0
"""Deep Compression (Han, Mao & Dally 2016, arXiv 1510.00149): prune, share weights, code; size and error at each step.

    dense ──prune, retrain──▶ P ──cluster, fine-tune tables──▶ P+Q ──Huffman, in the file──▶ P+Q+H

The training loop is the user's own. What comes out runs as it is stored: no layer is decoded to a dense one.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast

import torch
from torch import nn

from slimtorch import _select, storage
from slimtorch.formats import Codebook, SparseCodebook
from slimtorch.measure import memory_bytes
from slimtorch.nn import CodebookConv2d, CodebookLinear, SparseCodebookConv2d, SparseCodebookLinear
from slimtorch.prune import Magnitude, PruneReport, prune_
from slimtorch.prune.magnitude import check_fraction
from slimtorch.quantize.cluster import ClusterReport, cluster_, resolve
from slimtorch.quantize.kmeans import ClusterConfig, KMeans, sparse_entries
from slimtorch.report import Table, format_bytes

Path = str | os.PathLike[str]
SHARED = (CodebookLinear, CodebookConv2d, SparseCodebookLinear, SparseCodebookConv2d)


@dataclass(frozen=True)
class Stage:
    """What the training loop is called for.

    Attributes:
        name: "retrain" after pruning, "fine-tune" after clustering.
        round: from 1 on; of "retrain" only.
        rounds: of pruning and retraining together.
    """

    name: Literal["retrain", "fine-tune"]
    round: int = 1
    rounds: int = 1


Fit = Callable[[nn.Module, Stage], object]


@dataclass(frozen=True)
class DeepCompression:
    """The recipe of Deep Compression, as a whole (:meth:`run`) and in steps.

        recipe = DeepCompression(sparsity={"fc1": 0.92, "fc2": 0.91, "fc3": 0.74}, cluster=KMeans(bits=6))
        report = recipe.run(model, fit, accuracy, path="small.slim")      # fit(model, stage): any training loop

    is the same as

        slim.prune_(model, …)              # recipe.prune_(model)
        fit(model, Stage("retrain"))       # masked weights stay zero
        slim.cluster_(model, …)            # recipe.cluster_(model)
        fit(model, Stage("fine-tune"))     # only tables and biases are left to train; needs a new optimizer
        slim.save(model, "small.slim")     # Huffman codes for indices and gaps

    Args:
        sparsity: share of weights to remove, in [0, 1): one number for all layers, or by glob of layer names (layers
            that no glob matches stay whole).
        cluster: as for :func:`slimtorch.cluster_`.
        rounds: of pruning and retraining; each removes the same share of what is left. One large cut costs more
            accuracy than several small ones.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of range.
    """

    sparsity: float | Mapping[str, float] = 0.9
    cluster: ClusterConfig | Mapping[str, ClusterConfig | None] = field(default_factory=lambda: KMeans(bits=5))
    rounds: int = 1

    def __post_init__(self) -> None:
        values = self.sparsity if isinstance(self.sparsity, Mapping) else {"*": self.sparsity}
        if not values:
            raise ValueError("sparsity: expected at least one glob, got an empty mapping")
        for glob, value in values.items():
            check_fraction(f"sparsity[{glob!r}]" if isinstance(self.sparsity, Mapping) else "sparsity", value)
        if isinstance(self.rounds, bool) or not isinstance(self.rounds, int):
            raise TypeError(f"rounds: expected an int, got {self.rounds!r}")
        if self.rounds < 1:
            raise ValueError(f"rounds: expected 1 or more, got {self.rounds}")

    def magnitudes(self, round: int | None = None) -> Magnitude | dict[str, Magnitude]:
        """The configuration for ``prune_`` in a round (1 … rounds); None: the last."""
        share = 1.0 if round is None else round / self.rounds

        def at(final: float) -> Magnitude:
            return Magnitude(final if share == 1 else 1 - (1 - final) ** share)

        if isinstance(self.sparsity, Mapping):
            return {glob: at(value) for glob, value in self.sparsity.items()}
        return at(self.sparsity)

    def prune_(self, model: nn.Module, round: int | None = None) -> PruneReport:
        """The first step: masks for the smallest weights of each layer, as :func:`slimtorch.prune_`."""
        return prune_(model, self.magnitudes(round))

    def cluster_(self, model: nn.Module) -> ClusterReport:
        """The second step: shared weights in place, as :func:`slimtorch.cluster_`."""
        return cluster_(model, self.cluster)

    def run(
        self,
        model: nn.Module,
        fit: Fit,
        accuracy: Callable[[nn.Module], float] | None = None,
        *,
        path: Path | None = None,
    ) -> CompressionReport:
        """All steps, in place.

        Args:
            model: a trained model.
            fit: ``fit(model, stage)`` trains the model in place, in any way. It is called ``rounds`` times with
                ``stage.name == "retrain"`` and once with "fine-tune"; **it must make a new optimizer each time**.
            accuracy: ``accuracy(model) -> share in [0, 1]``, on held-out data; None leaves errors out of the report.
            path: where :func:`slimtorch.save` puts the file; None: nothing is left but its size.

        Returns:
            Sizes and errors after each step, and the numbers of each layer; prints as two tables in the paper's form.

        Raises:
            TypeError, ValueError: as ``prune_`` and ``cluster_``; ``fit`` or ``accuracy`` cannot be called. The kinds
                and globs of both configurations are checked before anything is trained.
        """
        if not callable(fit):
            raise TypeError(f"fit: expected a callable (model, stage), got {fit!r}")
        if accuracy is not None and not callable(accuracy):
            raise TypeError(f"accuracy: expected a callable model -> share, got {accuracy!r}")
        resolve(model, self.cluster, None)
        _select.resolve(model, self.magnitudes(), None, types=(nn.Linear, nn.Conv2d))

        def share() -> float | None:
            return None if accuracy is None else float(accuracy(model))

        steps = [Step("dense", dense_bytes(model), share())]
        pruned = self.prune_(model, 1)
        for round in range(1, self.rounds + 1):
            if round > 1:
                pruned = self.prune_(model, round)
            if round == self.rounds:
                steps.append(Step("pruned", pruned_bytes(model), share()))
            fit(model, Stage("retrain", round, self.rounds))
        steps.append(Step("P: retrained", pruned_bytes(model), share()))
        clustered = self.cluster_(model)
        steps.append(Step("clustered", memory_bytes(model), share()))
        fit(model, Stage("fine-tune", 1, self.rounds))
        steps.append(Step("P+Q: tables fine-tuned", memory_bytes(model), share()))
        with tempfile.TemporaryDirectory() as folder:
            file = os.path.join(folder, "model.slim") if path is None else path
            size = storage.save(model, file)
            layers = coded_layers(model, file)
        # Coding loses nothing: the same weights, the same predictions.
        steps.append(Step("P+Q+H: file", size, steps[-1].accuracy))
        return CompressionReport(steps, layers, pruned, clustered)


@dataclass(frozen=True)
class Step:
    """The model after one step.

    Attributes:
        name: "dense", "pruned", "P: retrained", "clustered", "P+Q: tables fine-tuned", "P+Q+H: file".
        nbytes: size after it.
        accuracy: on the user's data, in [0, 1], or None.
    """

    name: str
    nbytes: int
    accuracy: float | None


@dataclass(frozen=True)
class CodedLayer:
    """One layer in the numbers of the paper's tables 2 to 5. Bits are per stored entry, biases left out.

    Attributes:
        name: in the model.
        weights: of the dense layer.
        kept: share of weights that are not zero.
        weight_bits: of an index into the table (P+Q).
        weight_bits_coded: the same, Huffman coded, on average (P+Q+H).
        index_bits: of a position (P+Q); 0 where every weight is stored.
        index_bits_coded: the same, Huffman coded, on average (P+Q+H).
        dense_bytes: 4 for each weight.
        shared_bytes: of tables, indices and positions (P+Q).
        coded_bytes: of the same in the file (P+Q+H).
    """

    name: str
    weights: int
    kept: float
    weight_bits: float
    weight_bits_coded: float
    index_bits: float
    index_bits_coded: float
    dense_bytes: int
    shared_bytes: int
    coded_bytes: int


@dataclass
class CompressionReport:
    """The answer of :meth:`DeepCompression.run`; prints as two tables.

    Attributes:
        steps: sizes and accuracies, in order.
        layers: the layers with shared weights.
        pruned: what the last pruning did.
        clustered: what clustering did.
    """

    steps: list[Step]
    layers: list[CodedLayer]
    pruned: PruneReport
    clustered: ClusterReport

    @property
    def ratio(self) -> float:
        """Dense bytes over bytes of the file."""
        return self.steps[0].nbytes / self.steps[-1].nbytes

    def table(self) -> Table:
        """One row per step: table 1 of the paper, step by step."""
        dense = self.steps[0].nbytes
        rows: list[list[object]] = []
        for step in self.steps:
            error = None if step.accuracy is None else f"{1 - step.accuracy:.2%}"
            rows.append([step.name, error, format_bytes(step.nbytes), f"{dense / step.nbytes:.1f}x"])
        notes = [
            "P: a float32 and a position (5 bits in linear layers, 8 in convolutions, fillers counted) per weight",
            "P+Q: in memory, as it runs; P+Q+H: the whole file; biases are float32 throughout",
        ]
        return Table("Deep Compression", ["step", "test error", "size", "rate"], rows, notes)

    def layer_table(self) -> Table:
        """One row per layer: tables 2 and 3 of the paper."""
        return layer_table(self.layers)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "steps": [asdict(step) for step in self.steps],
            "layers": [asdict(layer) for layer in self.layers],
            "ratio": self.ratio,
        }

    def __str__(self) -> str:
        return f"{self.table()}\n\n{self.layer_table()}"


def layer_table(layers: list[CodedLayer], title: str = "Layer by layer") -> Table:
    """The paper's table of layers (tables 2 and 3) and a row for all of them."""
    rows: list[list[object]] = []
    for x in layers:
        rows.append([
            x.name or "(model)", x.weights, f"{x.kept:.1%}", f"{x.weight_bits:g}", f"{x.weight_bits_coded:.1f}",
            f"{x.index_bits:g}", f"{x.index_bits_coded:.1f}", f"{x.shared_bytes / x.dense_bytes:.2%}",
            f"{x.coded_bytes / x.dense_bytes:.2%}",
        ])  # fmt: skip
    total = sum(x.weights for x in layers)
    if len(layers) > 1:
        kept = sum(x.kept * x.weights for x in layers) / total
        shared, coded = sum(x.shared_bytes for x in layers), sum(x.coded_bytes for x in layers)
        rows.append([
            "together", total, f"{kept:.1%}", "", "", "", "", f"{shared / total / 4:.2%}", f"{coded / total / 4:.2%}"
        ])  # fmt: skip
    columns = [
        "layer", "weights", "kept (P)", "weight bits (P+Q)", "weight bits (P+Q+H)", "index bits (P+Q)",
        "index bits (P+Q+H)", "size (P+Q)", "size (P+Q+H)",
    ]  # fmt: skip
    notes = ["sizes: share of the dense float32 weights, tables and row starts counted, biases not"]
    return Table(title, columns, rows, notes)


# --- sizes ------------------------------------------------------------------------------------------------------------


def dense_bytes(model: nn.Module) -> int:
    """4 bytes for each parameter and floating-point buffer: the dense float32 model. Shared tensors count once."""
    tensors = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
    return 4 * sum(tensor.numel() for tensor in tensors)


def pruned_bytes(model: nn.Module) -> int:
    """The model with each masked weight kept as float32 and position, in the paper's way (section 2).

    A position is the distance to the weight before in 5 bits (linear layers) or 8 bits (convolutions), with a filler
    zero where the distance is larger. Whole layers, biases and buffers take 4 bytes a number.
    """
    total = dense_bytes(model)
    for module in model.modules():
        if not isinstance(module, (nn.Linear, nn.Conv2d)):
            continue
        weight = module.weight.detach()
        bits = 5 if isinstance(module, nn.Linear) else 8
        packed = (sparse_entries(weight, 1 << bits) * (32 + bits) + 7) // 8
        total -= max(0, 4 * weight.numel() - packed)
    return total


def coded_layers(model: nn.Module, path: Path) -> list[CodedLayer]:
    """The numbers of each layer with shared weights, in the model's order, from the model and its ``.slim`` file."""
    stored = {layer.name: layer for layer in storage.inspect(path).layers}
    return [_coded_layer(name, m, stored[name]) for name, m in model.named_modules() if isinstance(m, SHARED)]


@torch.no_grad()
def _coded_layer(name: str, module: nn.Module, stored: storage.LayerReport) -> CodedLayer:
    held = cast("Codebook | SparseCodebook", cast(Any, module).format)
    weights = math.prod(held.shape)
    kept = int(torch.count_nonzero(held.to_dense())) / max(1, weights)
    sparse = isinstance(held, SparseCodebook)
    entries = max(1, held.gaps.numel() if isinstance(held, SparseCodebook) else weights)
    sizes = {tensor.name: tensor.stored_bytes for tensor in stored.tensors if tensor.name != "bias"}
    bits = (float(held.bits), 8 * sizes["codes"] / entries, 8.0 * sparse, 8 * sizes.get("gaps", 0) / entries)
    return CodedLayer(name, weights, kept, *bits, 4 * weights, held.nbytes, sum(sizes.values()))
