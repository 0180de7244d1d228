#!/bin/bash
# Builds the CaS kernel, and variants of it where there are any, and measures them: run_cas.sh OUT_FOLDER [build|measure|profile|more]...
# About 60 s to build on 16 cores, 90 s to measure, 40 s to profile, 40 s for more.
here=$(cd "$(dirname "$0")" && pwd) root=$(cd "$(dirname "$0")/.." && pwd)
out=$1; shift; mkdir -p "$out" "$root/build/cas"; out=$(cd "$out" && pwd) built=$root/build/cas
parts=${*:-build measure profile more}
export PYTHONPATH=$here
flags="-O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -Xcompiler -fPIC -I$root/csrc"
sources="csrc/cas_server/cuda_requester.cpp csrc/cas_server/cuda_requester.cu csrc/cas_server/cuda_server.cpp
  csrc/cas_server/cuda_launches.cpp csrc/cas_server/serve_kernels.cu csrc/cas_server/tensor_maps.cpp"
# A change to try against what stands: a name here with the -D that the sources ask for, and the name in `builds`.
variant_flags() {
  case $1 in
    base) ;;
    trace) echo -DSIDP_CAS_TRACE ;;
  esac
}
builds="base"
traced="trace"
step() {  # step SECONDS NAME COMMAND...: the tail is shown, all of it is kept
  local limit=$1 name=$2 start=$SECONDS; shift 2
  timeout -k 5 "$limit" "$@" > "$out/$name.log" 2>&1 || echo "== $name: exit status $?"
  echo "== $name, $((SECONDS - start)) s"
  tail -n "${lines:-40}" "$out/$name.log"
}
build_one() { # SOURCE NAME: one object file
  local object=$built/$2.$(basename "$1").o
  nvcc $flags $(variant_flags "$2") -c -o "$object" "$root/$1" || echo "build of $1 for $2 failed"
}
if [[ $parts == *build* ]]; then
  start=$SECONDS
  for name in $builds $traced; do
    for source in $sources bench/cas_capi.cu; do build_one $source $name & done
  done
  nvcc $flags -o "$built/cas_read" "$root/bench/cas_read.cu" &
  for source in cas_selftest cas_processes; do build_one tests/gpu/$source.cpp base & done  # the same for all of them
  wait
  for name in $builds $traced; do
    objects=$(for s in $sources; do echo "$built/$name.$(basename $s).o"; done)
    nvcc -shared -o "$built/$name.so" $objects "$built/$name.cas_capi.cu.o" &
    nvcc -o "$built/selftest_$name" $objects "$built"/base.cas_{selftest,processes}.cpp.o &
  done
  wait
  echo "== build, $((SECONDS - start)) s"
fi
pairs() { for name in "$@"; do echo "$name=$built/$name.so"; done; }
if [[ $parts == *measure* ]]; then
  right=  # a kernel that traps takes its process' context with it: each build is tried in a process of its own first
  for name in $builds; do
    if timeout -k 5 15 "$built/selftest_$name" basic striped > "$out/selftest_$name.log" 2>&1; then
      right+=" $name"
    else
      echo "== $name FAILED its self test:"
      tail -n 5 "$out/selftest_$name.log"
    fi
  done
  echo "== self tests right:$right"
  step 90 compare python3 "$here/cas_compare.py" $(pairs $right) --sms 32,40,48,56,64 --rows 1,16,32,64,128 --out "$out/compare.json"
  for name in $traced; do
    step 25 "$name" python3 "$here/cas_compare.py" $(pairs $name) --trace --sms 40,48 --rows 1,16,64,128 --out "$out/$name.json"
  done
  step 15 read "$built/cas_read" short
  step 25 tiny python3 "$here/cas_compare.py" $(pairs $right) --shapes tiny --skip-small --sms 32 --rows 1,8,64
  step 40 owner python3 "$here/cas_kernel.py" "$built/base.so" --owner-cost --sms 40 --out "$out/owner.json"
fi
if [[ $parts == *more* ]]; then
  right=${right:-$builds}
  step 30 float16 python3 "$here/cas_compare.py" $(pairs $right) --dtype float16 --skip-small --sms 40 --rows 1,16,64
  lines=12 step 40 selftest "$built/selftest_base" basic striped relaunch faults free graph
fi
if [[ $parts == *profile* ]]; then
  ncu --query-metrics > "$built/metrics.txt" 2>/dev/null
  wanted="gpu__time_duration sm__cycles_elapsed dram__bytes_read lts__t_bytes l1tex__data_bank_reads l1tex__data_bank_writes
    l1tex__data_bank_conflicts_pipe_lsu l1tex__data_pipe_lsu_wavefronts_mem_shared l1tex__data_pipe_lsu_wavefronts
    l1tex__m_xbar2l1tex_read_bytes sm__inst_executed sm__inst_executed_pipe_tensor smsp__issue_active
    sm__pipe_tensor_cycles_active l1tex__lsuin_requests idc__requests sm__icc_requests gcc__requests"
  metrics=
  for metric in $wanted; do grep -q "^$metric " "$built/metrics.txt" && metrics+=,$metric.sum,$metric.sum.per_second; done
  for name in base; do
    lines=60 step 40 "ncu_$name" ncu --clock-control none -k regex:serve_sm90 -c 1 --section SpeedOfLight \
      --section WarpStateStats --metrics "${metrics#,}" \
      python3 "$here/cas_compare.py" $(pairs $name) --staged --sms 32 --rows 1
  done
fi
