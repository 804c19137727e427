# SPDX-License-Identifier: Apache-2.0
"""Who computes a problem: our layers, torch's dense and sparse kernels, and the engines behind `bench.peers`.

Every contender starts from the activations as a user has them (row-major x, NCHW maps) and ends with the same;
whatever it must convert on the way is inside its time. Weights are converted beforehand. A contender that does not
exist for a problem, or whose result is wrong, is reported with the reason; a wrong result of ours ends the benchmark.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import mkldnn as torch_mkldnn

from bench.peers import PeerError, Peers
from bench.timing import Contender, Reference, Timing, WrongResultError, interleave, local
from bench.timing import Settings as TimingSettings
from tests.problems import LinearProblem, Problem

Builder = Callable[[], Contender]

# Largest relative rounding of one accumulation step (all kernels accumulate in float32) and of storing one result.
_ACCUMULATE = 2.0**-24
_STORE = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}


@functools.lru_cache(maxsize=1)
def tensors(problem: Problem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Input, weight and bias, drawn once for all contenders of a problem. Nobody may write to them."""
    return problem.input(), problem.weight(), problem.bias()


def layer(problem: Problem) -> nn.Linear | nn.Conv2d:
    """The problem as the torch layer that a user has, in eval mode, with a weight of its own."""
    _, weight, bias = tensors(problem)
    module: nn.Linear | nn.Conv2d
    if isinstance(problem, LinearProblem):
        module = nn.utils.skip_init(nn.Linear, problem.k, problem.n, dtype=problem.dtype)
    else:
        module = nn.utils.skip_init(
            nn.Conv2d,
            problem.c_in,
            problem.c_out,
            problem.kernel,
            problem.stride,
            problem.padding,
            problem.dilation,
            problem.groups,
            dtype=problem.dtype,
        )
    module.weight = nn.Parameter(weight.clone())
    module.bias = nn.Parameter(bias.clone())
    return module.eval()


def reference(problem: Problem) -> Reference:
    """Solution in float64 and its error bound: n * u * (|x| @ |w| + |b|), for a float32 sum of n terms in any order.

    Higham, Accuracy and Stability of Numerical Algorithms (2002), section 4.2; plus the rounding of what is stored.
    """
    x, module = tensors(problem)[0].double(), layer(problem).double()
    with torch.no_grad():
        value = module(x)
        stored = module.weight.flatten(1)
        terms = int((stored != 0).sum(1).max()) + 2 if stored.numel() else 2
        module.weight.abs_()
        assert module.bias is not None
        module.bias.abs_()
        scale = module(x.abs())
    return Reference(value, terms * _ACCUMULATE * scale + 2 * _STORE[problem.dtype] * value.abs() + 1e-30)


# --- ours -------------------------------------------------------------------------------------------------------------


def _ours_sparse(problem: Problem) -> Contender:
    from slimtorch import nn as slim_nn

    dense, x = layer(problem), tensors(problem)[0]
    packed: nn.Module
    if isinstance(dense, nn.Linear):
        packed = slim_nn.SparseLinear.from_dense(dense)
    else:
        packed = slim_nn.SparseConv2d.from_dense(dense)
    return local("slimtorch-sparse", "ours", f"slimtorch.nn.{type(packed).__name__}", lambda: packed(x))


def _ours_block_sparse(problem: Problem) -> Contender:
    from slimtorch import nn as slim_nn

    dense, x = layer(problem), tensors(problem)[0]
    packed: nn.Module
    if isinstance(dense, nn.Linear):
        packed = slim_nn.BlockSparseLinear.from_dense(dense, block_size=problem.block_size)
    else:
        packed = slim_nn.BlockSparseConv2d.from_dense(dense, block_size=problem.block_size)
    return local("slimtorch-block-sparse", "ours", f"slimtorch.nn.{type(packed).__name__}", lambda: packed(x))


# --- torch, dense -----------------------------------------------------------------------------------------------------


def _torch_dense(problem: Problem) -> Contender:
    module, x = layer(problem), tensors(problem)[0]
    return local("torch", "dense", f"torch.nn.{type(module).__name__}", lambda: module(x))


def _torch_dense_fp32(problem: Problem) -> Contender:
    """What a user without fast bfloat16 hardware would run: the same layer in float32, input in float32 already."""
    module, x = layer(problem).float(), tensors(problem)[0].float()
    return local("torch-fp32", "dense-fp32", f"torch.nn.{type(module).__name__} in float32", lambda: module(x))


def _onednn(problem: Problem) -> Contender:
    if problem.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise NotImplementedError("oneDNN has no fast bfloat16 on this processor")
    module, x = layer(problem).float(), tensors(problem)[0]
    packed = torch_mkldnn.to_mkldnn(copy.deepcopy(module), problem.dtype)
    return local(
        "onednn", "dense", "torch.utils.mkldnn.to_mkldnn", lambda: packed(x.to_mkldnn()).to_dense(problem.dtype)
    )


def _onednn_prepacked(problem: Problem) -> Contender:
    """The operators that torch's compiler emits for frozen weights: oneDNN's own weight layout, plain activations."""
    if problem.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise NotImplementedError("oneDNN has no fast bfloat16 on this processor")
    x, weight, bias = tensors(problem)
    call: Callable[[], torch.Tensor]
    if isinstance(problem, LinearProblem):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, problem.m)

        def call() -> torch.Tensor:
            return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    else:
        padding, stride, dilation = list(problem.padding), list(problem.stride), list(problem.dilation)
        packed = torch.ops.mkldnn._reorder_convolution_weight(
            weight, padding, stride, dilation, problem.groups, list(x.shape)
        )

        def call() -> torch.Tensor:
            return torch.ops.mkldnn._convolution_pointwise(
                x, packed, bias, padding, stride, dilation, problem.groups, "none", [], ""
            )

    return local("onednn-prepacked", "dense", "torch.ops.mkldnn with prepacked weight", call)


def _mkl_prepacked(problem: Problem) -> Contender:
    if not isinstance(problem, LinearProblem) or problem.dtype != torch.float32:
        raise NotImplementedError("MKL's prepacked matrix product is for linear layers in float32")
    (x, weight, bias), rows = tensors(problem), problem.m
    packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)
    return local(
        "mkl-prepacked",
        "dense",
        "torch.ops.mkl._mkl_linear with prepacked weight",
        lambda: torch.ops.mkl._mkl_linear(x, packed, weight, bias, rows),
    )


# --- torch, sparse ----------------------------------------------------------------------------------------------------


def _times_matrix(problem: Problem, name: str, what: str, matrix: torch.Tensor) -> Contender:
    """`matrix @ x.T` for linear layers, `matrix @ columns of x` for convolutions (1x1 ones need no lowering)."""
    x, _, bias = tensors(problem)
    if isinstance(problem, LinearProblem):
        if problem.m == 1:
            vector = x[0]
            return local(name, "sparse", f"{what} @ x[0]", lambda: (matrix @ vector + bias)[None])
        return local(name, "sparse", f"{what} @ x.T", lambda: (matrix @ x.t()).t() + bias)
    height, width = problem.output_size
    if problem.groups != 1:
        raise NotImplementedError("torch's sparse matrices have no grouped product")
    if problem.kernel == (1, 1) and problem.stride == (1, 1) and problem.padding == (0, 0) and problem.batch == 1:
        channels, column = problem.c_in, bias[:, None]
        return local(
            name,
            "sparse",
            f"{what} @ x",
            lambda: (matrix @ x.view(channels, -1)).add_(column).view(1, -1, height, width),
        )

    def call() -> torch.Tensor:
        columns = F.unfold(x, problem.kernel, problem.dilation, problem.padding, problem.stride)
        lowered = columns[0] if problem.batch == 1 else columns.transpose(0, 1).reshape(columns.shape[1], -1)
        product = (matrix @ lowered).add_(bias[:, None]).view(-1, problem.batch, height, width)
        return product.transpose(0, 1).contiguous()

    return local(name, "sparse", f"{what} @ F.unfold(x)", call)


def _mkl_csr(problem: Problem) -> Contender:
    return _times_matrix(problem, "mkl-csr", "csr", tensors(problem)[1].flatten(1).to_sparse_csr())


def _torch_bsr(problem: Problem) -> Contender:
    height, width = problem.block_size
    rows, columns = tensors(problem)[1].flatten(1).shape
    if height != width:
        raise NotImplementedError("MKL's block-sparse matrices are for square blocks")
    if rows % height or columns % width:
        raise NotImplementedError(f"torch's BSR needs sizes divisible by the block, {rows}x{columns} is not")
    matrix = tensors(problem)[1].flatten(1).to_sparse_bsr(problem.block_size)
    return _times_matrix(problem, "torch-bsr", f"bsr {height}x{width}", matrix)


# --- one case ---------------------------------------------------------------------------------------------------------


def builders(problem: Problem, *, blocks: bool) -> list[tuple[str, Builder]]:
    """Name and builder of every contender of this process; ours in the benchmark's own format comes first."""
    known: list[tuple[str, Callable[[Problem], Contender]]] = [
        ("slimtorch-sparse", _ours_sparse),
        ("torch", _torch_dense),
        ("onednn", _onednn),
        ("onednn-prepacked", _onednn_prepacked),
        ("mkl-prepacked", _mkl_prepacked),
        ("mkl-csr", _mkl_csr),
    ]
    if blocks:
        known.insert(0, ("slimtorch-block-sparse", _ours_block_sparse))
        known.append(("torch-bsr", _torch_bsr))
    if problem.dtype != torch.float32:
        known.append(("torch-fp32", _torch_dense_fp32))
    return [(name, functools.partial(build, problem)) for name, build in known]


def time_problem(
    problem: Problem,
    settings: TimingSettings,
    *,
    blocks: bool,
    threads: int,
    peers: Peers | None,
    ours: bool = True,
) -> tuple[list[Timing], dict[str, str]]:
    """Verify, then time every contender of `problem`: timings, and the reason for each that cannot take part.

    `blocks` compares the block-sparse format (with the unstructured one beside it). `ours=False` leaves our layers out.
    Errors of our layers propagate.
    """
    expected = reference(problem)
    chosen = [item for item in builders(problem, blocks=blocks) if ours or not item[0].startswith("slimtorch")]
    if peers is not None:
        chosen += peers.builders(problem, threads)
    ready: list[Contender] = []
    errors: list[float] = []
    unavailable: dict[str, str] = {}
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse .* tensor support is in beta state")
        for name, build in chosen:
            mine = name.startswith("slimtorch")
            try:
                contender = build()
                error = expected.verify(name, contender.result())
            except WrongResultError as wrong:
                if mine:
                    raise
                unavailable[name] = str(wrong)
            except (NotImplementedError, RuntimeError, PeerError) as failure:
                if mine:
                    raise
                unavailable[name] = " ".join(str(failure).split())[:300]
            else:
                ready.append(contender)
                errors.append(error)
        timings: list[Timing] | None = None
        while timings is None:
            try:
                timings = interleave(ready, settings, errors)
            except PeerError as failure:  # died or hung while timed: the others are timed again without it
                unavailable[failure.engine] = str(failure)
                keep = [index for index, contender in enumerate(ready) if contender.name != failure.engine]
                ready, errors = [ready[index] for index in keep], [errors[index] for index in keep]
    if peers is not None:
        peers.unload()
    return timings, unavailable
