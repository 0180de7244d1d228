#!/bin/bash
# The GPU tests of CaS: run_cas.sh SELFTEST [LOG_FOLDER]. Every program under a time limit; MPS is started for the cases of
# several processes and stopped afterwards. Exit status 0 when all hold.
selftest=$1 logs=${2:-.} failed=0
run() {
  echo "== $*"
  timeout -k 5 "$@" || { echo "== exit status $?: $*"; failed=1; }
}
run 60 "$selftest" basic striped relaunch faults free graph
run 60 "$selftest" staged
for tool in memcheck racecheck synccheck; do
  run 60 compute-sanitizer --tool $tool --error-exitcode 9 --log-file "$logs/$tool.log" "$selftest" staged
  tail -n 3 "$logs/$tool.log"
done
export CUDA_MPS_PIPE_DIRECTORY=$(mktemp -d) CUDA_MPS_LOG_DIRECTORY=$(mktemp -d)
nvidia-cuda-mps-control -d
run 60 "$selftest" ipc2
run 60 "$selftest" ipc4
run 60 "$selftest" killed
echo quit | timeout 20 nvidia-cuda-mps-control
exit $failed
