#!/usr/bin/env bash
# The real trainer over the two hosts of hosts.sh. In each part the run must end in bounded time with
# no rank left, and the same command must then go on to the last step.
#
#   run.sh [DIR [PART …]]   parts: kill (a host, by pdsh), cut (its cable), slurm (a job preempts it)
#
# Prints what it saw; exit 0 also where it is skipped, with the reason.
set -euo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
[[ ${1:-} != -* ]] || { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" && exit 2; }
dir=${1:-$(mktemp -d)}
shift || true
hosts=$root/tests/cluster/hosts.sh slurm=$root/tests/cluster/slurm.sh
[[ $(id -u) == 0 ]] || { echo "skipped: needs root, for namespaces" && exit; }
for tool in ip sshd ssh pdsh unshare nsenter; do
  type -P "$tool" >/dev/null || { echo "skipped: needs $tool" && exit; }
done
! ip netns list | grep -q ^rmim- || { echo "skipped: such hosts are up already" && exit; }
cd "$root"
PATH=$root/.venv/bin:$PATH
"$hosts" up "$dir"
trap '"$hosts" down "$dir"' EXIT

python shard_tools/demo_images.py "$dir/images" --train 96 --val 48 --size 24 >/dev/null
python shard_tools/make_shards.py "$dir/images/train" "$dir/train" --shard-size 20KiB >/dev/null
python -c 'import json, sys
c = json.load(open("ds_configs/zero2.json")) | {"watchdog_seconds": 30}
json.dump(c, open(sys.argv[1], "w"))' "$dir/ds.json"
export GLOO_SOCKET_IFNAME=eth0 OMP_NUM_THREADS=1 PDSH_SSH_ARGS_APPEND="-F $dir/ssh_config"
small=(--recipe pipeline/recipes/rmae.yaml --ds_config "$dir/ds.json" --data "$dir/train"
  --set encoder.arch=vit_tiny_patch16_224 --set encoder.image_size=16
  --set 'encoder.options={patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2}'
  --set 'measure.decoder={width: 8, depth: 1, heads: 2}' --set batch_size=8 --set data.partitions=4
  --set data.workers=0 --set monitor.log_steps=20 --set monitor.save_steps=100
  --set optimizer.epochs=500 --set optimizer.warmup_epochs=1)

train() { # NAME ARGUMENT …: on the head, the launcher for both hosts
  "$hosts" on head "$dir" timeout 500 "$root/launch.sh" --hostfile "$dir/hostfile" "${small[@]}" \
    --output "$dir/$1" "${@:2}"
}

saved() { # NAME STEP PID: wait for a checkpoint
  until [[ -d $dir/$1/checkpoints/step-$(printf %08d "$2") ]]; do
    kill -0 "$3" || { cat "$dir/$1.log" && exit 1; }
    sleep 0.2
  done
}

fault() { # kill|cut: node2 is lost in the middle of a run
  local name=$1 run begun code=0 left last
  train "$name" --max-steps 5000 >"$dir/$name.log" 2>&1 &
  run=$!
  saved "$name" 200 "$run"
  "$hosts" "$name" node2 "$dir"
  begun=$SECONDS
  wait "$run" || code=$?
  echo "$name node2: launch.sh ended with $code in $((SECONDS - begun)) s"
  ((code != 0 && code != 85 && SECONDS - begun < 120)) || { cat "$dir/$name.log" && exit 1; }
  sleep 35 # what is behind a cut cable ends by its own watchdog
  left=$(pgrep -fc "pretrain.py .*$dir/$name" || true)
  echo "ranks left on both hosts: $left"
  [[ $left == 0 ]] || exit 1
  "$hosts" down "$dir" && "$hosts" up "$dir" # the machine comes back
  last=$(sed 's/step-0*//' "$dir/$name/checkpoints/latest")
  train "$name" --max-steps $((last + 20)) >"$dir/$name.log" 2>&1 || { cat "$dir/$name.log" && exit 1; }
  grep -h 'previous run failed\|resumes from\|^node1: done:' "$dir/$name.log"
}

preemption() { # a job of a higher partition takes both nodes; the trainer is requeued
  local log=$dir/slurm.log job
  export SLURM_CONF=$dir/slurm.conf
  "$slurm" up "$dir"
  trap '"$slurm" down "$dir"; "$hosts" down "$dir"' EXIT
  {
    printf '#!/bin/bash\n#SBATCH --nodes=2 --ntasks-per-node=1 --exclusive --requeue --open-mode=append\n'
    printf "export RELAXMIM_BATCH=\$SLURM_JOB_ID\ncd %q\nexec ./launch.sh" "$root"
    printf ' %q' "${small[@]}" --output "$dir/slurm" --max-steps 600
  } >"$dir/job.sbatch"
  job=$("$hosts" on head "$dir" sbatch --parsable -p low -o "$log" "$dir/job.sbatch")
  saved slurm 100 $$
  "$hosts" on head "$dir" sbatch -p high --exclusive -N2 -o /dev/null --wrap "sleep 3" >/dev/null
  timeout 400 bash -c "until grep -q ^done: '$log'; do sleep 1; done" || { cat "$log" && exit 1; }
  "$hosts" on head "$dir" scontrol show job "$job" | grep -o 'Restarts=[0-9]*'
  grep -h '^stopped by\|^resumes from\|^done:' "$log"
  grep -q '^resumes from' "$log"
}

parts=("$@")
((${#parts[@]})) || parts=(kill cut slurm)
for part in "${parts[@]}"; do
  case $part in
    kill | cut) fault "$part" ;;
    slurm)
      if type -P slurmctld >/dev/null && type -P munged >/dev/null; then
        preemption
      else
        echo "slurm: skipped, needs slurm-wlm and munge"
      fi
      ;;
    *) echo "error: $part: the parts are kill, cut and slurm" >&2 && exit 2 ;;
  esac
done
echo passed
