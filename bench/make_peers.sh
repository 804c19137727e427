#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds .venv-peers: DeepSparse and ONNX Runtime for bench/, apart from this library's environment.
# DeepSparse 1.8.0 has wheels for Python 3.8-3.11 on x86-64 Linux and needs numpy < 2. Where it cannot be installed,
# ONNX Runtime alone is, and the reason is printed. Usage: bench/make_peers.sh [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/.."
environment=.venv-peers
log=$(mktemp)
trap 'rm -f "$log"' EXIT

old_enough() { "$1" -c 'import sys; sys.exit(not (3, 8) <= sys.version_info[:2] <= (3, 11))' 2>/dev/null; }
usable() { "$environment/bin/python" -c "import $1" 2>/dev/null; }

if [[ -x $environment/bin/python ]] && usable deepsparse && usable onnxruntime; then
    echo "peers: $environment is ready"
    exit 0
fi

python=
for candidate in "${1:-}" python3.11 python3.10 python3.9 python3 python3.8; do
    if [[ -n $candidate ]] && old_enough "$candidate"; then
        python=$candidate
        break
    fi
done

rm -rf "$environment"
if [[ -n $python ]]; then
    "$python" -m venv "$environment"
    if "$environment/bin/python" -m pip install --disable-pip-version-check --quiet \
        "deepsparse==1.8.0" "onnxruntime>=1.17" "onnx<1.15" "numpy<2" >"$log" 2>&1 && usable deepsparse; then
        echo "peers: DeepSparse and ONNX Runtime are in $environment ($("$environment/bin/python" --version))"
        exit 0
    fi
    echo "peers: DeepSparse 1.8.0 does not install here:" >&2
    grep -iE 'error|no matching' "$log" | tail -n 3 >&2 || tail -n 3 "$log" >&2
    "$environment/bin/python" -c 'import deepsparse' 2>&1 | tail -n 1 >&2 || true
    rm -rf "$environment"
else
    echo "peers: no Python 3.8-3.11 found, which DeepSparse 1.8.0 needs" >&2
    python=python3
fi

"$python" -m venv "$environment"
if ! "$environment/bin/python" -m pip install --disable-pip-version-check --quiet \
    "onnxruntime>=1.17" onnx numpy >"$log" 2>&1 || ! usable onnxruntime; then
    echo "peers: ONNX Runtime does not install here either:" >&2
    tail -n 3 "$log" >&2
    rm -rf "$environment"
    exit 1
fi
echo "peers: ONNX Runtime alone is in $environment ($("$environment/bin/python" --version))"
