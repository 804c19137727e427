# SPDX-License-Identifier: Apache-2.0
"""Threads that share a layer, and children forked after use."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading

import torch

from tests.nn.cases import Case, each_case


@each_case
def test_two_threads_share_a_layer(case: Case) -> None:
    packed = case.packed_class.from_dense(case.twin().eval(), **case.options)
    inputs = [case.input(5, seed=seed) for seed in range(2)]
    with torch.no_grad():
        expected = [packed(x) for x in inputs]
    packed._plans.clear()  # so that both may derive plans at once
    start = threading.Barrier(2)
    failures: list[str] = []

    def work(index: int) -> None:
        start.wait()
        for _ in range(50):
            x = inputs[index].clone().requires_grad_()
            y = packed(x)
            y.sum().backward(inputs=[x])
            if not torch.equal(y.detach(), expected[index]):
                failures.append(f"thread {index}: another result")
                return

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert not failures


def test_a_child_forked_after_use_computes_the_same() -> None:
    # In a process of its own: the test runner may have started threads that a fork would break.
    program = """
        import os, sys, torch
        from tests.nn.cases import CASES

        torch.set_num_threads(1)
        layers = [(case.packed(), case.input(9)) for case in CASES]
        expected = [layer(x).detach() for layer, x in layers]
        child = os.fork()
        if child == 0:
            same = all(torch.equal(layer(x), y) for (layer, x), y in zip(layers, expected))
            layers[0][0](layers[0][1]).sum().backward()
            os._exit(0 if same else 3)
        _, status = os.waitpid(child, 0)
        sys.exit(os.waitstatus_to_exitcode(status))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], timeout=60, check=False)
    assert done.returncode == 0
