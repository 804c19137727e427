# SPDX-License-Identifier: Apache-2.0
"""One-dimensional k-means and Huffman codes: `python -m bench.coding --help`.

Rivals take turns with ours. k-means: scikit-learn where it is installed, and Lloyd's algorithm in numpy; they get as
many iterations as :data:`ITERATIONS`, we run once with as many and once to the fixed point. All on one thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from bench import machine
from slimtorch.ops import assign_1d, huffman_decode, huffman_encode, initial_centroids, kmeans_1d
from slimtorch.report import Table

ITERATIONS = 20
WEIGHTS, CLUSTERS = 1 << 24, 16
SYMBOLS = 1 << 24


def measure(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call, in turns; the first round warms up and is not kept."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def numpy_lloyd(values: np.ndarray, centroids: np.ndarray, iterations: int) -> np.ndarray:
    for _ in range(iterations):
        codes = np.searchsorted((centroids[1:] + centroids[:-1]) / 2, values)
        mass = np.bincount(codes, minlength=len(centroids))
        sums = np.bincount(codes, values, len(centroids))
        centroids = np.where(mass > 0, sums / np.maximum(mass, 1), centroids).astype(values.dtype)
    return centroids


def kmeans_calls(n: int, k: int, rivals: bool) -> dict[str, Callable[[], object]]:
    values = torch.randn(n, generator=torch.Generator().manual_seed(0)) * 0.05
    start = initial_centroids(values, k, "linear")
    weights = values.abs()
    found = kmeans_1d(values, start, iterations=10_000)
    calls: dict[str, Callable[[], object]] = {
        "k-means to the fixed point, and assignment": lambda: assign_1d(
            values, kmeans_1d(values, start, iterations=10_000)
        ),
        "k-means to the fixed point": lambda: kmeans_1d(values, start, iterations=10_000),
        f"k-means, {ITERATIONS} iterations": lambda: kmeans_1d(values, start, iterations=ITERATIONS),
        "k-means with importance": lambda: kmeans_1d(values, start, weights, iterations=10_000),
        "initial centroids by density": lambda: initial_centroids(values, k, "density"),
        f"assignment, {k} clusters": lambda: assign_1d(values, found),
        "assignment, 256 clusters": lambda: assign_1d(values, torch.linspace(-0.2, 0.2, 256)),
    }
    if not rivals:
        return calls
    calls[f"numpy Lloyd, {ITERATIONS} iterations"] = lambda: numpy_lloyd(values.numpy(), start.numpy(), ITERATIONS)
    try:
        from sklearn.cluster import KMeans
    except ImportError:
        return calls
    peer = KMeans(k, init=start.numpy()[:, None], n_init=1, max_iter=ITERATIONS, tol=0, algorithm="lloyd")
    calls[f"scikit-learn KMeans, {ITERATIONS} iterations"] = lambda: peer.fit(values.numpy()[:, None])
    return calls


def huffman_symbols(n: int) -> dict[str, torch.Tensor]:
    generator = np.random.default_rng(0)
    codes = np.clip(np.round(generator.normal(7.5, 2, n)), 0, 15).astype(np.uint8)
    gaps = np.minimum(generator.geometric(0.08, n) - 1, 255).astype(np.uint8)
    return {"4-bit codes": torch.from_numpy(codes), "gaps at 92 %": torch.from_numpy(gaps)}


def entropy(symbols: torch.Tensor) -> float:
    p = torch.bincount(symbols).double() / len(symbols)
    return float(-(p[p > 0] * p[p > 0].log2()).sum())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a sixteenth of the size, no rivals of k-means")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("kmeans", "huffman"))
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shrink = 16 if options.quick else 1
    cases: list[dict[str, Any]] = []

    def add(calls: dict[str, Callable[[], object]], count: int, **facts: Any) -> None:
        for name, seconds in measure(calls, options.rounds).items():
            cases.append(
                {
                    "name": name, **facts, "count": count, "median": statistics.median(seconds),
                    "minimum": min(seconds), "samples": len(seconds),
                }
            )  # fmt: skip

    if options.only != "huffman":
        n = WEIGHTS // shrink
        add(kmeans_calls(n, CLUSTERS, not options.quick), n, clusters=CLUSTERS)
    if options.only != "kmeans":
        n = SYMBOLS // shrink
        for name, symbols in huffman_symbols(n).items():
            blob = huffman_encode(symbols)
            assert torch.equal(huffman_decode(blob, n), symbols)
            calls: dict[str, Callable[[], object]] = {
                f"Huffman encode, {name}": lambda s=symbols: huffman_encode(s),  # type: ignore[misc]
                f"Huffman decode, {name}": lambda b=blob: huffman_decode(b, n),  # type: ignore[misc]
            }
            add(calls, n, entropy=entropy(symbols), bits=8 * len(blob) / n)

    rows: list[list[object]] = [
        [
            case["name"], f"{case['median']:.4f}", f"{case['minimum']:.4f}",
            f"{case['count'] / case['median'] / 1e6:.0f}",
            f"{case['entropy']:.3f} / {case['bits']:.3f}" if "bits" in case else "",
        ]
        for case in cases
    ]  # fmt: skip
    table = Table("k-means and Huffman codes", ["", "median s", "best s", "M/s", "entropy / bits"], rows)
    Console().print(table)
    if options.json:
        machine.save(options.json, "coding", cases)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
