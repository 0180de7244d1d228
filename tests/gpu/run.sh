#!/bin/bash
# The GPU tests of sidp and the benches of WaS: run.sh [PART ...] [--logs FOLDER]. Needs SIDP_EXTENSION_DIR (or an installed
# sidp). Each part ends within the time named here; exit status 0 when all hold.
#   single     (150 s) WaS in one process, the profiler's look at the hot path, a killed rank; no MPS
#   processes  (240 s) WaS in 2 and 4 processes, by cudaIpc and by VMM handles, families; under an MPS of its own
#   cas        (240 s) CaS through WeightPool in several processes; under an MPS of its own
#   survival   (240 s) groups that outlive a killed rank; no MPS
#   batch      (480 s) sidp run-batch: attention, decode steps, pooled as replicated, under an MPS of its own; a killed rank, without
#   sanitize   (240 s) memcheck, synccheck, initcheck and racecheck on a small run of the ring
#   bench      (300 s) bench/was_gpu.py: overlap, slices, host cost
#   offload    (240 s) bench/was_offload.py: accelerate and FSDP2 beside sidp
#   profile    (160 s) sidp bench --json --profile
#   locks      (90 s) bench/driver_locks.cu, built here, without MPS and with it
#   tests = single processes cas survival batch; without arguments: tests sanitize
here=$(cd "$(dirname "$0")" && pwd) logs=. failed=0 parts=()
while [ $# -gt 0 ]; do
  case $1 in
    --logs) logs=$2; shift ;;
    tests) parts+=(single processes cas survival batch) ;;
    single | processes | cas | survival | batch | sanitize | bench | offload | profile | locks) parts+=("$1") ;;
    *) echo "run.sh: no part named $1" >&2; exit 2 ;;
  esac
  shift
done
[ ${#parts[@]} -gt 0 ] || parts=(single processes cas survival batch sanitize)
mkdir -p "$logs"
test=$here/test_was_cuda.py several="processes or owners or families"
run() { timeout -k 5 "$@" || { echo "== exit status $?: $*"; failed=1; }; }
pytest() { run "$1" python3 -m pytest -q -p no:cacheprovider --durations=5 "${@:2}"; }

with_mps() {
  export CUDA_MPS_PIPE_DIRECTORY=$(mktemp -d) CUDA_MPS_LOG_DIRECTORY=$(mktemp -d)
  nvidia-cuda-mps-control -d
  "$@"
  echo quit | timeout 20 nvidia-cuda-mps-control
  rm -rf "$CUDA_MPS_PIPE_DIRECTORY" "$CUDA_MPS_LOG_DIRECTORY"
  unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
}

# initcheck looks at our kernels only: what libraries' kernels do is not ours to mend. What those write it then takes for unwritten,
# so copies by the driver are not asked about. (racecheck with a filter ends in an internal error of the tool.)
sanitize() {
  for tool in memcheck synccheck initcheck racecheck; do
    local only=()
    [ $tool != initcheck ] || only=(--kernel-name kns=sidp --check-api-memory-access no)
    run 60 compute-sanitizer --tool "$tool" "${only[@]}" --error-exitcode 9 --log-file "$logs/$tool.log" \
      python3 "$here/sanitized.py" tiny
    tail -n 2 "$logs/$tool.log"
  done
}

for part in "${parts[@]}"; do
  echo "== $part"
  case $part in
    single) pytest 150 -k "not ($several)" "$test" ;;
    processes) with_mps pytest 220 -k "$several" "$test" ;;
    cas) with_mps pytest 230 "$here/test_cas_cuda.py" ;;
    survival) pytest 230 "$here/test_survival_cuda.py" ;;
    batch)
      with_mps pytest 290 -k "not backups" "$here/../batch/test_paged_attention.py" "$here/test_run_batch_cuda.py"
      pytest 180 -k backups "$here/test_run_batch_cuda.py"
      ;;
    sanitize) sanitize ;;
    bench) run 290 python3 "$here/../../bench/was_gpu.py" > >(tee "$logs/was_gpu.jsonl") ;;
    offload) run 230 python3 "$here/../../bench/was_offload.py" > >(tee "$logs/was_offload.jsonl") ;;
    locks)
      nvcc -std=c++17 -O2 -arch=native -o "$logs/driver_locks" "$here/../../bench/driver_locks.cu" || failed=1
      run 25 "$logs/driver_locks"
      with_mps run 25 "$logs/driver_locks"
      rm -f "$logs/driver_locks" ;;
    profile) run 155 python3 -m sidp.cli bench --json "$logs/bench.json" --profile "$logs/profile.json" ;;
  esac
done
exit $failed
