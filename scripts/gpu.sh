#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that needs a GPU, in under ten minutes on 16 cores: builds for the GPU at hand into build/gpu, runs the tests
# of the CUDA kernels there, compute-sanitizer over small cases, and the benchmark. Each part has a limit, and what it
# found is in the results even if a later one fails or the time is up. Needs torch with CUDA, nvcc, CMake, Ninja and
# pybind11; installs nothing, and asks no network.
#
#   PYTHON=python3 SECONDS_IN_ALL=570 JOBS=16 scripts/gpu.sh [FILE]   default: bench/results/gpu/NAME-OF-THE-GPU.json
#
# Exit status: 0 if every part passed.
set -uo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
began=$SECONDS
total="${SECONDS_IN_ALL:-570}"
jobs="${JOBS:-$(nproc)}"
here="$root/build/gpu"
site="$here/site"

# ---- is there a GPU? ------------------------------------------------------------------------------------------------
no() {
  echo "gpu: $1" >&2
  exit 1
}
command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q . ||
  no "no CUDA device on this machine: nothing was run (\`python -m bench.gpu_status\` says what has run, and where)"
if [[ -z ${PYTHON:-} ]]; then
  for PYTHON in "$root/.venv/bin/python" python3; do
    command -v "$PYTHON" >/dev/null && "$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' \
      2>/dev/null && break
  done
fi
python="$(command -v "$PYTHON")" || no "no Python at $PYTHON"
mkdir -p "$here"
"$python" -c '
import json, sys
try:
    import torch
except ImportError:
    sys.exit("gpu: " + sys.executable + " has no torch; set PYTHON to one with a torch that has CUDA")
if not torch.cuda.is_available():
    sys.exit("gpu: the torch of " + sys.executable + " sees no CUDA device; set PYTHON to one with CUDA")
p = torch.cuda.get_device_properties(0)
if p.major < 8:
    sys.exit(f"gpu: {p.name} is of compute capability {p.major}.{p.minor}; the kernels need 8.0 or later")
json.dump({"name": p.name, "capability": f"{p.major}.{p.minor}", "cuda": torch.version.cuda}, open(sys.argv[1], "w"))
' "$here/device.json" || exit 1
[[ -x /usr/local/cuda/bin/nvcc ]] && export PATH="$PATH:/usr/local/cuda/bin"
command -v nvcc >/dev/null || no "no nvcc in PATH: the kernels cannot be built"
read -r name arch < <("$python" -c '
import json, re, sys
device = json.load(open(sys.argv[1]))
major, minor = device["capability"].split(".")
print(re.sub(r"[^a-z0-9]+", "-", device["name"].lower()).strip("-"), major + minor + ("a" if int(major) >= 9 else ""))
' "$here/device.json")
results="${1:-$root/bench/results/gpu/$name.json}"

# ---- parts ----------------------------------------------------------------------------------------------------------
rm -f "$here"/parts.tsv "$here"/bench.json "$here"/tests-*.xml "$here"/*.log
failed=0
# part NAME SECONDS COMMAND...: runs it with a limit, the smaller of SECONDS and what is left in all.
part() {
  local name=$1 limit=$2 left=$((total - (SECONDS - began))) status=0 start=$SECONDS
  shift 2
  ((limit > left)) && limit=$left
  if ((limit < 5)); then
    status=124
    echo "no time left" >"$here/$name.log"
  else
    timeout --kill-after=5 "$limit" "$@" >"$here/$name.log" 2>&1 || status=$?
  fi
  printf '%s\t%d\t%d\t%d\n' "$name" "$status" $((SECONDS - start)) "$limit" >>"$here/parts.tsv"
  case $status in
    0) echo "gpu: $name: passed ($((SECONDS - start)) s)" ;;
    77) echo "gpu: $name: skipped: $(tail -n 1 "$here/$name.log")" ;;
    *)
      failed=1
      echo "gpu: $name: failed with $status after $((SECONDS - start)) s of $limit; the end of $here/$name.log:"
      tail -n 15 "$here/$name.log"
      ;;
  esac
  "$python" -m bench.gpu_collect "$here" "$results"
  return $((status != 0 && status != 77))
}

build() {
  set -e
  local bin
  bin="$(dirname "$python")"
  export PATH="$bin:$PATH" # cmake and ninja may come from wheels
  cmake -S "$root" -B "$here/cmake" -G Ninja -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE="$python" \
    -DSKBUILD_PROJECT_VERSION="$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml | head -n 1)" \
    -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" -DCMAKE_CUDA_ARCHITECTURES="$arch-real" \
    -DCMAKE_INSTALL_PREFIX="$site"
  cmake --build "$here/cmake" -j "$jobs" --target _C
  rm -rf "$site"
  cp -r "$root/python" "$site"
  cmake --install "$here/cmake"
  # An editable install would still be found first: its import hook stands before PYTHONPATH.
  printf '%s\n' 'import sys' '' \
    'sys.meta_path = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]' \
    >"$site/sitecustomize.py"
  PYTHONPATH="$site" "$python" -c '
from slimtorch import _C
assert "build/gpu" in _C.__file__, f"another library was loaded: {_C.__file__}"
assert _C.cuda_archs(), "built without CUDA kernels"
print(_C.cuda_archs())'
}

sanitizer() {
  command -v compute-sanitizer >/dev/null || { echo "no compute-sanitizer in PATH"; return 77; }
  # torch probes the driver with calls that may fail; only what kernels do counts.
  local api=()
  [[ $1 == memcheck ]] && api=(--report-api-errors no)
  # Every tensor is an allocation of its own, so that no access beyond one falls into another.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" "${api[@]}" --error-exitcode 9 --print-limit 20 \
    "$python" tests/cuda/sanitizer_cases.py
}

export -f build sanitizer
export root here site python arch jobs

part build 240 bash -c build || exit 1
export PYTHONPATH="$site:$root"
export PYTHONDONTWRITEBYTECODE=1
workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n 4)
pytest=("$python" -m pytest -q -p no:cacheprovider -m cuda)
part intrinsics 60 "${pytest[@]}" tests/cuda/test_intrinsics.py --junitxml="$here/tests-intrinsics.xml"
part tests 160 "${pytest[@]}" "${workers[@]}" tests/cuda tests/ops/test_cuda.py tests/test_measure.py \
  --ignore=tests/cuda/test_intrinsics.py --junitxml="$here/tests-all.xml"
part memcheck 80 bash -c 'sanitizer memcheck'
part racecheck 80 bash -c 'sanitizer racecheck'
left=$((total - (SECONDS - began)))
part benchmark "$left" "$python" -m bench.gpu --seconds $((left - 25)) --json "$here/bench.json"
tail -n 80 "$here/benchmark.log"
"$python" -m bench.gpu_status
echo "gpu: $((SECONDS - began)) s in all; the results: $results"
exit $failed
