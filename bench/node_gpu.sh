#!/bin/bash
# The paper's experiment on a node of N GPUs: node_gpu.sh N STEP [FOLDER]. Needs SIDP_EXTENSION_DIR (or an installed sidp).
# Each step ends within 9 minutes; results and logs go to FOLDER (default: node_gpu/).
#   dry    (60 s)   small shapes; on a machine with fewer than N GPUs under an MPS of its own
#   group  (180 s)  incast, the tail's ladder, CaS over rows, the choice (bench/group_gpu.py)
#   batch  (360 s)  run-batch: 32B replicated and pooled, 70B pooled, answers of 128 tokens (bench/run_batch_gpu.py)
#   long   (540 s)  run-batch at 4K
set -u
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD/python:$PWD/bench${PYTHONPATH:+:$PYTHONPATH}"
n=$1 step=$2 out=${3:-node_gpu}
mkdir -p "$out"
exec > >(tee "$out/$step.txt") 2>&1
nvidia-smi --query-gpu=name,memory.total --format=csv,noheader

parts="incast tail cas auto"
case $step in
  dry)
    if [ "$(nvidia-smi -L | wc -l)" -lt "$n" ]; then
      export CUDA_MPS_PIPE_DIRECTORY=$(mktemp -d) CUDA_MPS_LOG_DIRECTORY=$(mktemp -d) CUDA_VISIBLE_DEVICES=0
      nvidia-cuda-mps-control -d
      trap 'echo quit | nvidia-cuda-mps-control' EXIT
    fi
    timeout -k 5 60 python3 bench/group_gpu.py --ranks "$n" --shape tiny --layers 8 --repeats 3 --parts was $parts \
      --rows 64 --cas-rows 1 16 --cross-rows 16 256 --budget-s 50 --json "$out/dry.json" ;;
  group)
    timeout -k 5 200 python3 bench/group_gpu.py --ranks "$n" --layers 12 --parts $parts --cas-rows 1 16 64 128 \
      --cross-rows 64 128 256 384 512 768 --budget-s 150 --json "$out/group.json" ;;
  batch)
    timeout -k 5 370 python3 bench/run_batch_gpu.py --devices "$n" --rows "x$n 1K" --answer 128 --budget-s 350 --json "$out/batch.json" ;;
  long)
    timeout -k 5 540 python3 bench/run_batch_gpu.py --devices "$n" --rows "x$n 4K" --budget-s 520 --json "$out/long.json" ;;
  *) echo "node_gpu.sh: no step named $step" >&2; exit 2 ;;
esac
