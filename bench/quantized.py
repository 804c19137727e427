# SPDX-License-Identifier: Apache-2.0
"""README's section about quantized weights, from the JSON in bench/results/quantized and bench/results/experiments.

The benchmarks of quantized families write JSON of their own shape, because their rivals and sizes differ; what they
share is a list of cases with timings. `python -m bench.tables` calls :func:`section`.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.markdown import markdown, ratio
from slimtorch.report import format_bytes, format_seconds

Json = dict[str, Any]


def load(folder: Path, benchmark: str) -> list[Json]:
    """The results of one benchmark, in the order of their file names."""
    files = sorted((folder / "quantized").glob("*.json"))
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    return [content for content in contents if content["benchmark"] == benchmark]


def medians(case: Json) -> dict[str, float]:
    return {timing["contender"]: float(timing["median"]) for timing in case["timings"]}


def best_dense(case: Json) -> float:
    return min(float(t["median"]) for t in case["timings"] if t["role"] in ("dense", "dense-fp32"))


def _over(rival: float | None, ours: float) -> str:
    return ratio(None if rival is None else rival / ours)


WEIGHT_ONLY = ("torch-int4", "torch-int8", "onnxruntime-fp32", "onnxruntime-int8")


def codebook(contents: Sequence[Json]) -> str:
    """Shared weights: one row for each case."""
    rows = []
    for case in (case for content in contents for case in content["cases"]):
        times = medians(case)
        ours = times["slimtorch"]
        rows.append([
            f"{case['n']} → {case['n']}, M = {case['m']}, {case['bits']} bits, {case['dtype']}",
            format_seconds(ours), _over(times["torch"], ours), _over(best_dense(case), ours),
            *(_over(times.get(name), ours) for name in WEIGHT_ONLY),
        ])  # fmt: skip
    columns = ["codebook linear", "ours", "x torch", "x best dense", "x torch int4", "x torch int8", "x ORT fp32",
               "x ORT int8"]  # fmt: skip
    return markdown(columns, rows)


def sparse_codebook(contents: Sequence[Json]) -> str:
    """Sparse shared weights."""
    rows = []
    for case in (case for content in contents for case in content["cases"]):
        times = medians(case)
        ours = times["slimtorch"]
        rows.append([
            f"{case['n']} → {case['n']}, M = {case['m']}, {1 - case['density']:.0%} zero, {case['bits']} bits",
            format_seconds(ours), _over(times["slimtorch-sparse"], ours), _over(times["torch"], ours),
            _over(best_dense(case), ours), f"{case['bytes_per_nonzero']:.2f}",
        ])  # fmt: skip
    columns = ["sparse codebook linear", "ours", "x our sparse", "x torch", "x best dense", "bytes per nonzero"]
    return markdown(columns, rows)


def binary(contents: Sequence[Json]) -> str:
    """Binary weights, over signs and over floats."""
    rows, roofs = [], []
    for content in contents:
        roofs += [f"{name} {value:.0f}" for name, value in content["popcount_roof_gops"].items()]
        for case in content["cases"]:
            times = medians(case)
            ours = times["slimtorch"]
            rows.append([
                f"{case['name']}, {'signs' if case['binarize_input'] else 'float activations'}", format_seconds(ours),
                f"{case['operations'] / ours * 1e-9:.0f}", _over(times["torch"], ours), _over(best_dense(case), ours),
            ])  # fmt: skip
    note = f"Popcount roof of the machine in the same run, GOP/s: {', '.join(roofs)}."
    return markdown(["binary", "ours", "GOP/s", "x torch", "x best dense"], rows) + "\n\n" + note


def coding(contents: Sequence[Json]) -> str:
    """k-means and Huffman codes."""
    rows = [
        [
            case["name"], f"{case['count'] / 1e6:.1f}", format_seconds(case["median"]),
            f"{case['count'] / case['median'] / 1e6:.0f}",
        ]
        for content in contents
        for case in content["cases"]
    ]  # fmt: skip
    return markdown(["k-means and Huffman codes", "million items", "time", "million items a second"], rows)


def networks(contents: Sequence[Json]) -> str:
    """Whole networks."""
    rows = []
    for case in (case for content in contents for case in content["cases"]):
        seconds = {name: latency["median"] for name, latency in case["seconds"].items()}
        rows.append([
            f"{case['network']}, input {'×'.join(map(str, case['input']))}", format_seconds(seconds["torch"]),
            format_seconds(seconds["as stored"]), _over(seconds["torch"], seconds["as stored"]),
            _over(case["best_dense"], seconds["as stored"]), _over(case["best_dense"], seconds["pack_"]),
            f"{format_bytes(case['bytes_dense'])} → {format_bytes(case['bytes'])}",
        ])  # fmt: skip
    columns = ["network", "torch", "as stored", "x torch", "x best dense", "after `pack_`, x best dense", "memory"]
    return markdown(columns, rows)


def _experiment(folder: Path, name: str) -> Json | None:
    path = folder / "experiments" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _errors(values: Sequence[float]) -> str:
    return f"{100 * statistics.fmean(values):.2f} ± {100 * statistics.stdev(values):.2f} %"


def deep_compression(folder: Path) -> str:
    """Sizes, errors and times of `slimtorch experiment deep-compression`."""
    found = _experiment(folder, "deep-compression")
    if found is None:
        return ""
    titles = {"lenet300": "LeNet-300-100", "lenet5": "LeNet-5"}
    rows, times = [], []
    for name, network in found["networks"].items():
        for step in network["steps"]:
            dense = network["steps"][0]["bytes"]
            rows.append([
                titles[name], step["name"], _errors(step["errors"]), format_bytes(round(step["bytes"])),
                f"{dense / step['bytes']:.1f}x",
            ])  # fmt: skip
        for batch, latency in network["latency"].items():
            dense = {who: latency[who]["median"] for who in ("torch", "oneDNN", "frozen") if who in latency}
            ours = latency["compressed"]["median"]
            times.append([
                titles[name], batch, format_seconds(dense["torch"]), format_seconds(ours), _over(dense["torch"], ours),
                _over(min(dense.values()), ours),
            ])  # fmt: skip
    sizes = markdown(["network", "step", "test error", "size", "smaller"], rows)
    heading = f"{found['seeds']} seeds; {found['data']}. Size of the last step: the whole file that `slim.save` wrote."
    latencies = markdown(["network", "batch", "dense, torch", "compressed", "x torch", "x best dense"], times)
    return f"{heading}\n\n{sizes}\n\nAs executed, one thread:\n\n{latencies}"


def binary_networks(folder: Path) -> str:
    """The tables of the experiments about binary networks."""
    parts = []
    for name in ("binary-connect", "binary-net", "xnor-net"):
        found = _experiment(folder, name)
        for table in [] if found is None else found["tables"]:
            rows = [[str("–" if cell is None else cell) for cell in row] for row in table["rows"]]
            parts.append(f"{table['title']}:\n\n{markdown(table['columns'], rows)}")
    return "\n\n".join(parts)


PARTS = {
    "codebook": codebook,
    "sparse_codebook": sparse_codebook,
    "binary": binary,
    "networks": networks,
    "coding": coding,
}


def section(folder: Path) -> str:
    """What stands in README between the markers, from the results in `folder`; "" without any."""
    parts = []
    for benchmark, table in PARTS.items():
        contents = load(folder, benchmark)
        if not contents:
            continue
        if not parts:
            machine, versions = contents[0]["machine"], contents[0]["versions"]
            parts.append(
                f"{machine['cpu']}, our kernels: {machine['isa']}; torch {versions['torch']}; "
                f"{contents[0]['date'][:10]}; one thread, median times; x: how many times faster we are."
            )
        parts.append(table(contents))
    return "\n\n".join(parts)
