#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# All tests with the instruction set that this CPU prefers, and before them the tests of operators and layers with every
# other one that it can run. With SLIMTORCH_CPU set: all tests, with that one alone.
# Usage: scripts/test.sh PYTHON
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1

if [[ -z ${SLIMTORCH_CPU:-} ]]; then
    others=$("$python" -c '
from slimtorch import _C
print(*(name for name, missing in _C.isas().items() if not missing and name != _C.isa()))')
    for isa in $others; do
        echo "kernels: $isa"
        SLIMTORCH_CPU=$isa "$python" -m pytest -q tests/ops tests/nn
    done
fi
echo "kernels: $("$python" -c 'from slimtorch import _C; print(_C.isa())')"
"$python" -m pytest
