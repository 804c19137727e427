# SPDX-License-Identifier: Apache-2.0
"""The cases for compute-sanitizer run at all (here on the CPU), and name every family."""

from __future__ import annotations

import pytest

from bench import sources
from tests.cuda import sanitizer_cases


@pytest.mark.filterwarnings("ignore:slimtorch.*has no kernel for torch.float16 on cpu")
def test_all_of_them_run(capsys: pytest.CaptureFixture[str]) -> None:
    names = [case.name for case in sanitizer_cases.problems()]
    assert sanitizer_cases.main("cpu") == len(names) * len(sanitizer_cases.DTYPES)
    assert "binary_linear_of_signs_larger float16" in capsys.readouterr().out
    for family in sources.kernel_families():
        if family != "common":
            assert {f"{family}_linear", f"{family}_conv2d", f"{family}_linear_larger"} <= set(names)


def test_it_ends_in_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert sanitizer_cases.main("cpu", seconds=-1) == 0
    assert "left out" in capsys.readouterr().out
