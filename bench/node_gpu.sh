#!/bin/bash
# The paper's experiment on a node of N GPUs: node_gpu.sh N STEP [FOLDER]. Needs SIDP_EXTENSION_DIR (or an installed sidp).
# Each step ends within 9 minutes; results and logs go to FOLDER (default: node_gpu/).
#   dry      (60 s)   small shapes; on a machine with fewer than N GPUs under an MPS of its own
#   group    (180 s)  incast, the tail's ladder, CaS over rows, the choice (bench/group_gpu.py)
#   modes    (360 s)  run-batch at 1K: 32B replicated, by WaS alone and switching; the modes over time (bench/run_batch_gpu.py)
#   batch    (420 s)  run-batch at 2K: 32B replicated and pooled
#   large    (420 s)  run-batch at 1K: 70B by tensor parallelism of pairs (bench/run_batch_tp.py) and pooled at TP=1
#   long     (540 s)  run-batch at 4K: 32B replicated and pooled
#   profile  (120 s)  where steps of 32B go, in mode auto (bench/step_profile.py)
set -u
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD/python:$PWD/bench${PYTHONPATH:+:$PYTHONPATH}"
n=$1 step=$2 out=${3:-node_gpu}
mkdir -p "$out"
exec > >(tee "$out/$step.txt") 2>&1
nvidia-smi --query-gpu=name,memory.total --format=csv,noheader

batch() { timeout -k 5 "$2" python3 bench/run_batch_gpu.py --devices "$n" --rows "${@:3}" --budget-s "$2" --json "$out/$1.json"; }

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
  modes) batch modes 350 "32B x$n 1K replicated" "32B x$n 1K pooled was" "32B x$n 1K pooled auto"
    python3 bench/plot_timeline.py "$out/modes.json" "$out/modes.png" ;;
  batch) batch batch 410 "32B x$n 2K replicated" "32B x$n 2K pooled auto" ;;
  large) batch large 410 "70B x$n 1K TP=2 x DP=$((n / 2))" "70B x$n 1K pooled auto" ;;
  long) batch long 530 "32B x$n 4K replicated" "32B x$n 4K pooled auto" ;;
  profile)
    python3 - "$n" >"$out/in.jsonl" <<'END'
import json, random, sys
for n in range(136 * int(sys.argv[1])):  # 51 steps with prompts, then 60 without: all of them are still there to be looked at
    prompt = [random.randrange(1, 150000) for _ in range(768)]
    print(json.dumps({"id": f"r{n}", "prompt": prompt, "max_tokens": 160, "ignore_eos": True}))
END
    timeout -k 5 110 torchrun --nproc-per-node "$n" bench/step_profile.py "$out/steps" -i "$out/in.jsonl" -o "$out/out.jsonl" \
      --overwrite --model Qwen3-32B --load-format dummy --max-batch 512 --mode auto --backend cuda --gpu-memory-utilization 0.85 ;;
  *) echo "node_gpu.sh: no step named $step" >&2; exit 2 ;;
esac
