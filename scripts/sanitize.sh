#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds the native library with AddressSanitizer and UndefinedBehaviorSanitizer into build/sanitize, beside the installed
# one, and runs the operator tests on it with every instruction set that this CPU can run. Fails on the first report.
#
#   PYTHON=path/to/python JOBS=2 scripts/sanitize.sh [pytest arguments, instead of tests/ops]
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-$root/.venv/bin/python}"
jobs="${JOBS:-$(nproc)}"
build="$root/build/sanitize"
site="$build/site"
cd "$root"

if ! command -v "$python" >/dev/null; then
  echo "sanitize: no Python at $python; run \`make test\` first or set PYTHON" >&2
  exit 1
fi

# ---- build ----------------------------------------------------------------------------------------------------------
bin="$(dirname "$(command -v "$python")")"
PATH="$bin:$PATH" # cmake and ninja may come from wheels
version="$("$python" -c 'from importlib.metadata import version; print(version("slimtorch"))')"
cmake -S "$root" -B "$build" -G Ninja \
  -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE="$(command -v "$python")" -DSKBUILD_PROJECT_VERSION="$version" \
  -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" \
  -DSLIM_SANITIZE=ON -DSLIM_EMULATED_AVX512=ON -DSLIM_CUDA=OFF -DCMAKE_INSTALL_PREFIX="$site" >"$build.log" 2>&1 ||
  { cat "$build.log" >&2; exit 1; }
cmake --build "$build" -j "$jobs"
rm -rf "$site"
cp -r "$root/python" "$site"
cmake --install "$build" >/dev/null
# An editable install would still be found first: its import hook stands before PYTHONPATH.
cat >"$site/sitecustomize.py" <<'PY'
import sys

sys.meta_path = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]
PY

# ---- run ------------------------------------------------------------------------------------------------------------
# The runtimes come first in a process whose interpreter was not built with them; libstdc++ so that they see exceptions.
preload=""
for library in libasan.so libubsan.so libstdc++.so; do
  preload="$preload $(readlink -f "$(${CXX:-g++} -print-file-name=$library)")"
done
sanitized() {
  env LD_PRELOAD="${preload# }" PYTHONPATH="$site" PYTHONMALLOC=malloc OMP_NUM_THREADS=2 \
    ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:detect_stack_use_after_return=0 \
    UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1:abort_on_error=1 "$@"
}

isas="$(sanitized "$python" -c '
from slimtorch import _C

assert "build/sanitize" in _C.__file__, f"sanitize: the wrong library was loaded: {_C.__file__}"
print(*(name for name, missing in _C.isas().items() if not missing))')"

# What is left out adds no kernel code: forcing instruction sets is done here, tracing and compiling run the same kernels
# under a compiler that is slow when sanitized, and a forked child of a sanitized process is the sanitizer's business.
if [ $# -eq 0 ]; then
  set -- tests/ops --deselect tests/ops/test_isa.py -m "not slow_sanitized and not cuda"
fi
for isa in $isas; do
  echo "sanitize: SLIMTORCH_CPU=$isa"
  SLIMTORCH_CPU="$isa" sanitized "$python" -m pytest -q -x --capture=sys -p no:cacheprovider "$@"
done
echo "sanitize: no report with $(echo $isas)"
