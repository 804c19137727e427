# SPDX-License-Identifier: Apache-2.0
"""Whole quantized networks against the same ones in dense float32: `python -m bench.networks --help`.

Clustered multilayer perceptron and transformer block (4-bit codebooks), a pruned and clustered perceptron (90 % zeros,
4 bits), and a ResNet-18-shaped network with binary weights and activations after XNOR-Net. Weights are random: nothing
here is about accuracy. Each is timed with all its layers in the format of its name, and as `pack_` leaves it; rivals
are torch, oneDNN with prepacked weights and frozen TorchScript on the dense float network.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import slimtorch as slim
from bench import machine
from bench.run import guarded, positive
from slimtorch.experiments.rivals import best_dense, dense_rivals
from slimtorch.measure import interleave, memory_bytes, prepacked_bytes
from slimtorch.models import resnet18
from slimtorch.report import Table, format_bytes, format_seconds


class TransformerBlock(nn.Module):
    """One encoder block (Vaswani et al. 2017, section 3.1), normalised before each part."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """``x [N, tokens, width]``."""
        h = self.norm1(x)
        q, k, v = (
            layer(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 1000)
    )  # fmt: skip


def clustered(model: nn.Module) -> None:
    slim.cluster_(model, slim.quantize.KMeans(bits=4))


def deep_compressed(model: nn.Module) -> None:
    slim.prune_(model, slim.prune.Magnitude(sparsity=0.9))
    slim.cluster_(model, slim.quantize.KMeans(bits=4))


def binarized(model: nn.Module) -> None:
    slim.binarize_(model, slim.quantize.XnorNet())


@dataclass(frozen=True)
class Network:
    """A dense network, what makes it smaller, and the shapes of its inputs."""

    name: str
    build: Callable[[], nn.Module]
    compress: Callable[[nn.Module], None]
    format: str  # of the compressed layers
    inputs: tuple[tuple[int, ...], ...]


NETWORKS = (
    Network("mlp 4-bit", perceptron, clustered, "codebook", ((1, 1024), (16, 1024), (64, 1024))),
    Network("mlp 90 % 4-bit", perceptron, deep_compressed, "sparse_codebook", ((1, 1024), (16, 1024), (64, 1024))),
    Network(
        "transformer 4-bit", lambda: TransformerBlock(1024, 16, 4096), clustered, "codebook",
        ((1, 1, 1024), (1, 16, 1024), (1, 128, 1024)),
    ),
    Network("resnet18 xnor", lambda: resnet18(10), binarized, "binary", ((1, 3, 64, 64), (8, 3, 64, 64))),
)  # fmt: skip


def measure(network: Network, shape: tuple[int, ...], samples: int) -> dict[str, Any]:
    """Times of everybody for one network and input, in one process and by turns."""
    torch.manual_seed(0)
    dense = network.build().eval()
    x = torch.randn(shape)
    compressed = copy.deepcopy(dense)
    network.compress(compressed)
    compressed.eval()
    expected = compressed(x)
    named, packed = copy.deepcopy(compressed), copy.deepcopy(compressed)
    for model, formats, gain in ((named, network.format, 0.0), (packed, "auto", 0.05)):
        if not (model is named and network.format.endswith("codebook")):  # those layers have their format already
            slim.pack_(model, x, formats=formats, objective="size" if model is named else "latency", min_gain=gain)
        if not torch.allclose(model(x), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
            raise AssertionError(f"{network.name}: the packed network computes something else")
    calls: dict[str, Callable[[], object]] = dict(dense_rivals(dense, x))
    calls |= {"as stored": lambda: named(x), "pack_": lambda: packed(x)}
    times = interleave(calls, samples=samples, min_sample_seconds=5e-3)
    kinds = sorted({type(module).__name__ for module in packed.modules() if isinstance(module, slim.nn.PackedLayer)})
    return {
        "network": network.name,
        "input": list(shape),
        "seconds": {name: asdict(latency) for name, latency in times.items()},
        "best_dense": best_dense({name: times[name] for name in times}),
        "bytes_dense": memory_bytes(dense),
        "bytes": memory_bytes(named),
        "bytes_prepacked": prepacked_bytes(named),
        "chosen_by_pack": kinds,
    }


def table(cases: list[dict[str, Any]]) -> Table:
    """Times and ratios, a row for each network and input."""
    rows: list[list[object]] = []
    for case in cases:
        seconds = {name: latency["median"] for name, latency in case["seconds"].items()}
        rows.append([
            f"{case['network']} {'x'.join(map(str, case['input']))}", format_seconds(seconds["torch"]),
            format_seconds(seconds["as stored"]), seconds["torch"] / seconds["as stored"],
            case["best_dense"] / seconds["as stored"], case["best_dense"] / seconds["pack_"],
            format_bytes(case["bytes"]), case["bytes_dense"] / case["bytes"],
        ])  # fmt: skip
    columns = ["network, input", "torch", "stored", "x torch", "x best", "pack_", "memory", "smaller"]
    notes = ["median times, 1 thread; x best, pack_: times faster than the best dense code, as stored and after pack_"]
    return Table("Whole networks, dense float32 against quantized", columns, rows, notes)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.networks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few samples: a first look")
    parser.add_argument("--only", help="networks whose name contains this")
    parser.add_argument("--samples", type=positive, help="of each contender (default 15, quick 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    return guarded(lambda: run(parser.parse_args()))


def run(options: argparse.Namespace) -> int:
    """Measure what the options ask for."""
    cases: list[dict[str, Any]] = []
    with machine.restricted(machine.cores(), 1), torch.no_grad():
        for network in NETWORKS:
            if options.only and options.only not in network.name:
                continue
            for shape in network.inputs:
                cases.append(measure(network, shape, options.samples or (5 if options.quick else 15)))
                if options.json:
                    machine.save(options.json, "networks", cases)
    Console().print(table(cases))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
