#!/bin/bash
# The GPU tests of WaS: run.sh [LOG_FOLDER]. Needs SIDP_EXTENSION_DIR (or an installed sidp). First without MPS, then the
# tests of several processes under an MPS of its own, which is stopped afterwards; sanitizers last.
logs=${1:-.} failed=0 here=$(cd "$(dirname "$0")" && pwd)
test=$here/test_was_cuda.py
run() { timeout -k 5 "$@" || { echo "== exit status $?: $*"; failed=1; }; }
run 120 python3 -m pytest -q -p no:cacheprovider --durations=5 -k "not processes and not owners and not families" "$test"
export CUDA_MPS_PIPE_DIRECTORY=$(mktemp -d) CUDA_MPS_LOG_DIRECTORY=$(mktemp -d)
nvidia-cuda-mps-control -d
run 150 python3 -m pytest -q -p no:cacheprovider --durations=5 -k "processes or owners or families" "$test"
echo quit | timeout 20 nvidia-cuda-mps-control
unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
for tool in memcheck racecheck synccheck initcheck; do
  run 60 compute-sanitizer --tool $tool --error-exitcode 9 --log-file "$logs/$tool.log" \
    python3 "$here/sanitized.py"
  tail -n 2 "$logs/$tool.log"
done
exit $failed
