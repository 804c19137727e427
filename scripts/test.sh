#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# All tests with the instruction set that this CPU prefers, and before them the tests of operators and layers with every
# other one that it can run, side by side, since tests use one thread; those of the CUDA kernels run beside them. The last
# line is that of the full run, or of the first one that failed. With SLIMTORCH_CPU set: all tests, with that one alone.
# Usage: scripts/test.sh PYTHON
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1

# Processes side by side must not spin for each other's threads; tests that want more threads than one ask for them.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}

chosen=$("$python" -c 'from slimtorch import _C; print(_C.isa())')
logs=$(mktemp -d)
declare -A running
stop() {
    for pid in "${running[@]}"; do kill "$pid" 2>/dev/null || true; done
    rm -rf "$logs"
}
trap stop EXIT
if [[ -z ${SLIMTORCH_CPU:-} ]]; then
    others=$("$python" -c '
from slimtorch import _C
print(*(name for name, missing in _C.isas().items() if not missing and name != _C.isa()))')
    for isa in $others; do
        echo "kernels: $isa (tests of operators and layers; output follows at the end)"
        # k-means and Huffman codes have no kernels for an instruction set of its own
        SLIMTORCH_CPU=$isa "$python" -m pytest -q -p no:cacheprovider tests/ops tests/nn \
            --ignore=tests/ops/test_kmeans.py --ignore=tests/ops/test_huffman.py >"$logs/$isa" 2>&1 &
        running[$isa]=$!
    done
    for isa in $others; do
        status=0
        wait "${running[$isa]}" || status=$?
        echo "kernels: $isa"
        cat "$logs/$isa"
        [[ $status == 0 ]] || exit "$status"
        unset "running[$isa]"
    done
fi
# Tests of the CUDA kernels take a process of their own beside all others: in the emulator they are the longest.
"$python" -m pytest -q -p no:cacheprovider tests/cuda >"$logs/cuda" 2>&1 &
running[cuda]=$!
echo "kernels: $chosen (all other tests; those of CUDA kernels run beside them)"
status=0
"$python" -m pytest --ignore=tests/cuda >"$logs/all" 2>&1 || status=$?
cuda=0
wait "${running[cuda]}" || cuda=$?
unset "running[cuda]"
show() {
    echo "kernels: $1"
    cat "$logs/$2"
}
if [[ $cuda == 0 ]]; then
    show CUDA cuda
    show "$chosen" all
    exit "$status"
fi
show "$chosen" all
show CUDA cuda
exit "$cuda"
