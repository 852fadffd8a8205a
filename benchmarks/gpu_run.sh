#!/usr/bin/env bash
# The whole GPU run: build, tests, golden products, tuning, benchmarks, plots. Under 10 minutes; downloads nothing.
#
#     benchmarks/gpu_run.sh [--rehearse] [FOLDER]
#
# Steps that are done are left out when it is started again on the same FOLDER (default: build/gpu_run). A step that
# fails, or is cut short when the 10 minutes are up, stops the run. FOLDER then holds doctor.txt, build.log, tests.log,
# golden.json, tuned.json, results.json and results.png, and steps.txt, the list of what is done. --rehearse does every
# step on a machine with no GPU: Triton's interpreter and the emulator of CUDA in its place, and tiny sizes; no time of
# it means anything.
# PYTHON chooses the interpreter (default: .venv/bin/python where there is one).
set -euo pipefail
cd "$(dirname "$0")/.."

rehearse=
if [ "${1:-}" = --rehearse ]; then rehearse=--rehearse; shift; fi
if [ $# -gt 1 ] || [[ "${1:-}" == -* ]]; then echo "Expected [--rehearse] [FOLDER], got $*" >&2; exit 2; fi
out=${1:-build/gpu_run${rehearse:+-rehearsal}}
mkdir -p "$out"
out=$(cd "$out" && pwd)
if [ -z "${PYTHON:-}" ]; then PYTHON=$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3); fi
export SPARSEKD_CACHE_DIR="$out/.cache"  # tuned tiles of this run alone, until they are written down
[ -z "$rehearse" ] || export SPARSEKD_REHEARSE=1 OMP_NUM_THREADS=1

step() {  # NAME SECONDS COMMAND...
  local name=$1 limit=$2; shift 2
  if grep -qx "$name" "$out/steps.txt" 2>/dev/null; then echo "$name: done before"; return; fi
  echo "$name ..."
  local start=$SECONDS left=$((600 - SECONDS))
  if [ -n "$rehearse" ]; then limit=$((6 * limit));  # interpreted, and on whatever machine
  elif [ "$limit" -gt "$left" ]; then limit=$((left > 1 ? left : 1)); fi
  timeout "$limit" "$@" || { echo "$name: failed with $?, see $out" >&2; exit 1; }
  echo "$name: $((SECONDS - start)) s"
  echo "$name" >> "$out/steps.txt"
}

doctor() { "$PYTHON" -m sparsekd.cli doctor > "$out/doctor.txt"; }

build() {
  if [ -n "$rehearse" ]; then
    "$PYTHON" -c 'import sparsekd; print("built before:", sparsekd.__file__)'
  else
    TORCH_CUDA_ARCH_LIST=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') \
      SPARSEKD_CUDA=1 "$PYTHON" -m pip install -e . --no-build-isolation --no-deps
  fi
}

# On the day by 8 processes where pytest-xdist is installed: Triton's compiler takes most of the time.
# compute-sanitizer watches a few of the tests, where it is there. Joined by &&: within `logged`, -e does nothing.
tests() {
  local workers=()
  if [ -z "$rehearse" ] && "$PYTHON" -c 'import xdist' 2> /dev/null; then workers=(-n 8); fi
  "$PYTHON" -m pytest tests/test_gpu.py -p no:cacheprovider ${workers[@]+"${workers[@]}"} &&
  if [ -n "$rehearse" ]; then
    "$PYTHON" -m pytest tests/test_cuda_conv2d.py -p no:cacheprovider -k "0 and not 10" --maxfail=1
  elif command -v compute-sanitizer > /dev/null; then
    timeout 60 compute-sanitizer --error-exitcode 9 "$PYTHON" -m pytest tests/test_gpu.py -p no:cacheprovider \
      -k "random_convolutions and 1" || [ $? = 124 ] && echo "compute-sanitizer: to here"
  else
    echo "compute-sanitizer: not there"
  fi
}

logged() { local file=$1; shift; "$@" > "$out/$file" 2>&1 || { tail -n 20 "$out/$file" >&2; return 1; }; }
export -f build tests logged doctor
export out rehearse PYTHON
run=(benchmarks/gpu_run.py $rehearse --folder "$out")

step build 240 bash -euc 'logged build.log build'
step doctor 60 bash -euc doctor
step tests 240 bash -euc 'logged tests.log tests'
step golden 60 "$PYTHON" "${run[@]}" golden
step tune 120 "$PYTHON" "${run[@]}" tune
step bench 240 "$PYTHON" "${run[@]}" bench
step plot 60 "$PYTHON" "${run[@]}" plot
rm -rf "$SPARSEKD_CACHE_DIR"
ls -l "$out"
