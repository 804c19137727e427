# SPDX-License-Identifier: Apache-2.0
"""What torch asks of an operator, and what a process does to one: tracing, threads, forks, the same bits twice."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from slimtorch.formats import BlockSparse, Sparse, SparseCodebook
from tests.ops.operators import (
    DTYPES,
    FEW_FORMATS,
    SPARSE,
    Format,
    Weight,
    apply,
    check_forward,
    check_gradients,
    family,
    geometry,
    random,
    raw,
    raw_calls,
    tensors,
)
from tests.problems import ConvProblem, LinearProblem, Problem

LINEAR = LinearProblem("linear", 9, 20, 40, 0.4, seed=1)
CONV = ConvProblem("conv2d", 2, 4, 20, 8, 7, (3, 2), (2, 1), (1, 1), (1, 2), 2, 0.4, seed=1)
POINTWISE = ConvProblem("pointwise", 2, 6, 20, 9, 9, (1, 1), density=0.4, seed=1)
PROBLEMS: tuple[Problem, ...] = (LINEAR, CONV, POINTWISE)
each_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=str)
each_family = pytest.mark.parametrize("form", [SPARSE, Format((4, 8))], ids=["sparse", "block_sparse"])


def every_operator() -> set[str]:
    names = (name.partition("::") for name in torch._C._dispatch_get_all_op_names())
    return {name.partition(".")[0] for namespace, _, name in names if namespace == "slimtorch"}


# ---- opcheck ---------------------------------------------------------------------------------------------------------


def _opcheck(name: str, arguments: dict[str, Any]) -> None:
    op = getattr(torch.ops.slimtorch, name).default
    ordered = tuple(arguments.get(a.name) for a in op._schema.arguments)
    torch.library.opcheck(op, ordered)


@pytest.mark.slow_sanitized
@each_family
@pytest.mark.parametrize("problem", [LINEAR, CONV], ids=str)
@pytest.mark.parametrize("plans", [True, False], ids=["plans", "no_plans"])
def test_opcheck(problem: Problem, form: Format, plans: bool) -> None:
    x, weight, bias = tensors(problem, form, torch.float32)
    calls = raw_calls(x, weight, bias if plans else None, relu=plans, plans=plans, **geometry(problem))
    for name, arguments in calls.items():
        _opcheck(name, arguments)


@pytest.mark.slow_sanitized
@each_family
@pytest.mark.parametrize("problem", [LINEAR, CONV], ids=str)
def test_opcheck_with_gradients(problem: Problem, form: Format) -> None:
    x, weight, bias = tensors(problem, form, torch.float32)
    layer = "linear" if problem is LINEAR else "conv2d"
    name = f"{family(weight)}_{layer}"
    x.requires_grad_()
    bias.requires_grad_()
    weight = replace(weight, values=weight.values.requires_grad_())
    calls = raw_calls(x, weight, bias, **geometry(problem))
    _opcheck(name, calls[name])


@pytest.mark.slow_sanitized
def test_opcheck_of_packed_values() -> None:
    for dtype in DTYPES:
        _, weight, _ = tensors(LINEAR, SPARSE, dtype)
        _opcheck("sparse_pack_values", {"values": weight.values, "plan": weight.plan()})


# Made on the CPU for a weight that lies on a GPU.
def cuda_plans() -> dict[str, dict[str, Any]]:
    dense = LINEAR.weight()
    sparse, shared = Sparse.pack(dense), SparseCodebook.pack(dense, bits=3)
    blocks = BlockSparse.pack(dense, (8, 8))
    rows, width = dense.shape
    return {
        "sparse_cuda_plan": {
            "columns": sparse.columns, "row_offsets": sparse.row_offsets, "width": width, "groups": 1,
            "transposed": False,
        },
        "block_sparse_cuda_plan": {
            "columns": blocks.block_columns, "row_offsets": blocks.block_row_offsets, "block_size": (8, 8),
            "rows": rows, "width": width, "groups": 1, "transposed": True,
        },
        "sparse_codebook_cuda_plan": {
            "codes": shared.codes, "gaps": shared.gaps, "row_offsets": shared.row_offsets, "width": width,
            "groups": 1, "bits": 3,
        },
    }  # fmt: skip


def test_opcheck_of_plans_for_cuda() -> None:
    for name, arguments in cuda_plans().items():
        _opcheck(name, arguments)


# In test_kmeans.py and test_huffman.py.
CODING = {
    "kmeans_1d", "quantiles_1d", "assign_1d", "huffman_lengths", "huffman_size", "huffman_encode", "huffman_decode",
}  # fmt: skip


# Families with an opcheck of every operator in their own files, test_<family>*.py.
QUANTIZED = {
    "codebook": {
        "linear", "conv2d", "linear_inference", "conv2d_inference", "cuda_plan", "decode", "sum_members",
    },
    "sparse_codebook": {
        "linear", "conv2d", "linear_inference", "conv2d_inference", "plan", "positions", "decode", "sum_members",
    },
    "binary": {
        "linear", "conv2d", "linear_inference", "conv2d_inference", "linear_to_bits", "conv2d_to_bits",
        "linear_from_bits", "conv2d_from_bits", "plan", "scale_dots",
    },
}  # fmt: skip


def test_every_operator_is_checked() -> None:
    checked = {"sparse_pack_values", *CODING, *cuda_plans()}
    checked |= {f"{family}_{name}" for family, names in QUANTIZED.items() for name in names}
    for form in (SPARSE, Format((4, 8))):
        for problem in (LINEAR, CONV):
            x, weight, bias = tensors(problem, form, torch.float32)
            checked |= set(raw_calls(x, weight, bias, **geometry(problem)))
    assert every_operator() == checked


@each_family
@each_problem
def test_fake_and_meta_give_the_shapes(problem: Problem, form: Format) -> None:
    x, weight, bias = tensors(problem, form, torch.bfloat16)
    for name, arguments in raw_calls(x, weight, bias, **geometry(problem)).items():
        if name.endswith("_plan"):
            continue  # its length is known only from the positions
        real = raw(name, **arguments)
        meta = raw(name, **{k: v.to("meta") if isinstance(v, Tensor) else v for k, v in arguments.items()})
        assert meta.shape == real.shape
        assert meta.dtype == real.dtype
        assert meta.stride() == real.stride()


# ---- plans and packed values change no result ------------------------------------------------------------------------


@each_family
@each_problem
def test_with_and_without_plans(problem: Problem, form: Format) -> None:
    x, weight, bias = tensors(problem, form, torch.float32)
    options = geometry(problem)
    with_plans = raw_calls(x, weight, bias, **options)
    without = raw_calls(x, weight, bias, plans=False, **options)
    for name, arguments in with_plans.items():
        assert torch.equal(raw(name, **arguments), raw(name, **without[name]))


@each_family
@pytest.mark.parametrize("m", [1, 3, 70])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_changed_values_are_seen(dtype: torch.dtype, m: int, form: Format) -> None:
    x, weight, bias = tensors(LinearProblem("", m, 40, 50, 0.3, seed=1), form, dtype)
    check_forward(x, weight, bias)
    weight.values.mul_(2)  # in place, as an optimizer does
    check_forward(x, weight, bias)
    weight.values.data.mul_(-0.5)  # behind torch's version counter
    check_forward(x, weight, bias)
    with torch.no_grad():
        weight.values.view(-1)[-1] += 1
    check_forward(x, weight, bias)
    other = replace(weight, values=weight.values.clone() * 3)  # shares the plans
    check_forward(x, other, bias)
    check_forward(x, weight, bias)
    with torch.inference_mode():
        check_forward(x, weight, bias)
        fresh = form.pack(weight.to_dense() * 2)
        check_forward(x, fresh, bias)
        fresh.values.mul_(2)
        check_forward(x, fresh, bias)
    check_gradients(x, weight, bias)


# ---- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow_sanitized
@pytest.mark.usefixtures("fresh_dynamo")
@each_family
def test_compile_linear_with_dynamic_batch(form: Format) -> None:
    _, weight, bias = tensors(LINEAR, form, torch.float32)

    def block(x: Tensor, values: Tensor) -> Tensor:
        return apply(x * 2, replace_values(weight, values), bias, relu=True).sum(-1)

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (2, 5, 40):
        x, values = random(m, 40).requires_grad_(), weight.values.detach().clone().requires_grad_()
        expected, y = block(x, values), compiled(x, values)
        assert torch.equal(y, expected)
        assert all(
            torch.equal(a, b)
            for a, b in zip(
                torch.autograd.grad(y.sum(), [x, values]), torch.autograd.grad(expected.sum(), [x, values]), strict=True
            )
        )


@pytest.mark.slow_sanitized
@pytest.mark.usefixtures("fresh_dynamo")
@each_family
def test_compile_conv2d_with_dynamic_sizes(form: Format) -> None:
    _, weight, bias = tensors(CONV, form, torch.float32)

    def block(x: Tensor) -> Tensor:
        return apply(x, weight, bias, **geometry(CONV)).tanh()

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, height, width in ((2, 8, 7), (3, 9, 12), (5, 20, 11)):
        x = random(batch, 4, height, width)
        assert torch.equal(compiled(x), block(x))


def replace_values(weight: Weight, values: Tensor) -> Weight:
    return type(weight)(**{**weight.__dict__, "values": values})


# ---- the same bits ---------------------------------------------------------------------------------------------------

LARGE_LINEAR = LinearProblem("large", 150, 300, 400, 0.2, seed=1)  # enough work for two threads
LARGE_CONV = ConvProblem("large", 6, 24, 40, 20, 20, padding=(1, 1), density=0.3, seed=1)
each_large = pytest.mark.parametrize("problem", [LARGE_LINEAR, replace(LARGE_LINEAR, m=3), LARGE_CONV], ids=str)


def everything(problem: Problem, form: Format, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients."""
    x, weight, bias = tensors(problem, form, dtype)
    x.requires_grad_()
    values = weight.values.requires_grad_()
    y = apply(x, weight, bias.requires_grad_(), relu=True, **geometry(problem))
    return [y.detach(), *torch.autograd.grad((y * y).sum(), [x, values, bias])]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FEW_FORMATS, ids=str)
@each_large
def test_the_same_bits_twice(problem: Problem, form: Format, dtype: torch.dtype) -> None:
    first = everything(problem, form, dtype)
    for _ in range(2):
        assert same(everything(problem, form, dtype), first)


@pytest.mark.parametrize("form", FEW_FORMATS, ids=str)
@each_large
def test_any_number_of_threads(problem: Problem, form: Format) -> None:
    x, weight, bias = tensors(problem, form, torch.float32)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            check_forward(x, weight, bias, **geometry(problem))
            check_gradients(x, weight, bias, **geometry(problem))
    finally:
        torch.set_num_threads(before)


# ---- threads and forks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FEW_FORMATS, ids=str)
@each_large
def test_two_python_threads_share_one_weight(problem: Problem, form: Format) -> None:
    x, weight, bias = tensors(problem, form, torch.float32)
    inputs = [x, x.flip(0) * 2]
    options = geometry(problem)
    expected = [apply(i, form.pack(weight.to_dense()), bias, **options) for i in inputs]
    gradients = [torch.autograd.grad(_sum(i, weight, bias, options), weight.values)[0] for i in inputs]
    # A weight that nobody has planned yet: both threads make its plans at once.
    fresh = form.pack(weight.to_dense())
    fresh.values.requires_grad_()
    failures: list[str] = []
    start = threading.Barrier(2)

    def run(which: int) -> None:
        start.wait()
        for _ in range(6):
            if not torch.equal(apply(inputs[which], fresh, bias, **options), expected[which]):
                failures.append(f"forward of thread {which}")
            grad = torch.autograd.grad(_sum(inputs[which], fresh, bias, options), fresh.values)[0]
            if not torch.equal(grad, gradients[which]):
                failures.append(f"backward of thread {which}")

    threads = [threading.Thread(target=run, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def _sum(x: Tensor, weight: Weight, bias: Tensor, options: dict[str, Any]) -> Tensor:
    weight.values.requires_grad_()
    return apply(x, weight, bias, **options).square().sum()


@pytest.mark.slow_sanitized
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("form", FEW_FORMATS, ids=str)
def test_fork_after_use(form: Format) -> None:
    x, weight, bias = tensors(LARGE_LINEAR, form, torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # a fork does not take OpenMP's threads along: torch's own rule
    try:
        expected = apply(x, weight, bias)
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(apply(x, weight, bias), expected) else 1)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert torch.equal(apply(x, weight, bias), expected)
    finally:
        torch.set_num_threads(before)
