# SPDX-License-Identifier: Apache-2.0
"""Runs one peer engine in its own environment and answers requests, one JSON object a line, on stdin and stdout.

Started by `bench.peers` as `python peers_worker.py ENGINE`, with ENGINE `deepsparse` or `onnxruntime`. It imports
nothing of this project and no torch, so that the engine's dependencies are its own. Requests, answered in order:

    {"do": "hello"}                                   -> {"versions": {...}, "about": "..."}
    {"do": "load", "problem": FILE.npz, "threads": n} -> {}            builds the ONNX model and compiles it
    {"do": "run", "to": FILE.npy}                     -> {}            the output, for checking
    {"do": "sample", "calls": n}                      -> {"seconds": s}
    {"do": "unload"}                                  -> {}

A request that fails is answered by {"error": "..."} and the worker goes on.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO


def _answer_pipe() -> TextIO:
    """A private copy of stdout; descriptor 1 then goes to stderr, since engines print banners on it."""
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return pipe


def onnx_model(problem: dict[str, Any]) -> Any:
    """An ONNX model of one layer with its bias; weights are dense initialisers with zeros, as exporters write them."""
    from onnx import TensorProto, helper, numpy_helper

    if problem["kind"] == "matmul_nbits":
        return matmul_nbits_model(problem)
    weight, bias, x = problem["weight"], problem["bias"], problem["x"]
    if problem["kind"] == "linear":
        node = helper.make_node("Gemm", ["x", "weight", "bias"], ["y"], transB=1)
        shape = [x.shape[0], weight.shape[0]]
    else:
        padding = [int(size) for size in problem["padding"]]
        node = helper.make_node(
            "Conv",
            ["x", "weight", "bias"],
            ["y"],
            kernel_shape=list(weight.shape[2:]),
            strides=[int(size) for size in problem["stride"]],
            pads=padding + padding,
            dilations=[int(size) for size in problem["dilation"]],
            group=int(problem["groups"]),
        )
        shape = [x.shape[0], weight.shape[0], *(int(size) for size in problem["output_size"])]
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(bias, "bias")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 8  # what both engines' oldest supported releases read
    return model


def matmul_nbits_model(problem: dict[str, Any]) -> Any:
    """Product with uniformly quantized weights [n, blocks, bytes], scales [n * blocks]; the middle value is 0."""
    from onnx import TensorProto, helper, numpy_helper

    x, weight, bits = problem["x"], problem["weight"], int(problem["bits"])
    n, block = weight.shape[0], weight.shape[2] * 8 // bits
    node = helper.make_node(
        "MatMulNBits", ["x", "weight", "scales"], ["y"], domain="com.microsoft", K=x.shape[1], N=n, bits=bits,
        block_size=block, accuracy_level=int(problem["level"]),
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [x.shape[0], n])],
        [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(problem["scales"], "scales")],
    )
    opsets = [helper.make_opsetid("", 13), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets)
    model.ir_version = 8
    return model


class DeepSparse:
    def __init__(self) -> None:
        os.environ["NM_DISABLE_ANALYTICS"] = "1"
        import deepsparse

        self._package = deepsparse

    def versions(self) -> dict[str, str]:
        return {"deepsparse": self._package.__version__}

    def about(self) -> str:
        from deepsparse.cpu import cpu_architecture

        cpu = cpu_architecture()
        vnni = "yes" if cpu.vnni else "no"
        return f"instruction set {cpu.isa}, VNNI {vnni}"

    def load(self, path: str, x: Any, threads: int) -> Callable[[], Any]:
        engine = self._package.compile_model(path, batch_size=int(x.shape[0]), num_cores=threads)
        inputs = [x]
        return lambda: engine.run(inputs, val_inp=False)[0]


class OnnxRuntime:
    def __init__(self) -> None:
        import onnxruntime

        self._package = onnxruntime

    def versions(self) -> dict[str, str]:
        return {"onnxruntime": self._package.__version__}

    def about(self) -> str:
        return ", ".join(self._package.get_available_providers())

    def load(self, path: str, x: Any, threads: int) -> Callable[[], Any]:
        options = self._package.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Its threads would otherwise go on spinning while the next contender is timed.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = self._package.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        inputs = {"x": x}
        return lambda: session.run(None, inputs)[0]


def main() -> None:
    answers = _answer_pipe()
    engine: DeepSparse | OnnxRuntime | None = None
    engine_error = ""
    call: Callable[[], Any] | None = None
    try:
        import numpy
        import onnx

        engine = DeepSparse() if sys.argv[1] == "deepsparse" else OnnxRuntime()
    except Exception as error:  # whatever an engine raises while importing is its reason, passed on
        engine_error = f"{type(error).__name__}: {error}"

    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        try:
            if engine is None:
                answer = {"error": engine_error}
            elif request["do"] == "hello":
                versions = dict(engine.versions(), onnx=onnx.__version__, numpy=numpy.__version__)
                answer = {"versions": versions, "about": engine.about()}
            elif request["do"] == "load":
                with numpy.load(request["problem"], allow_pickle=False) as file:
                    problem = {name: file[name] for name in file.files}
                path = os.path.splitext(request["problem"])[0] + ".onnx"
                onnx.save(onnx_model(problem), path)
                call = engine.load(path, numpy.ascontiguousarray(problem["x"]), request["threads"])
            elif request["do"] == "unload":
                call = None
            elif call is None:
                raise RuntimeError("no problem is loaded")
            elif request["do"] == "run":
                numpy.save(request["to"], call())
            elif request["do"] == "sample":
                calls = range(request["calls"])
                begin = time.perf_counter_ns()
                for _ in calls:
                    call()
                answer = {"seconds": (time.perf_counter_ns() - begin) * 1e-9}
            else:
                raise ValueError(f"unknown request {request!r}")
        except Exception as error:  # the other side decides what an engine's failure means
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
