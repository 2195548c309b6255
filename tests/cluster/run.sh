#!/usr/bin/env bash
# The real trainer over two hosts of hosts.sh, by pdsh: one host is killed in the middle, the run must
# end in bounded time with no rank left, and the same command must then go on to the last step.
#
#   run.sh [DIR]      prints what it saw; exit 0 also where it is skipped, with the reason
set -euo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
dir=${1:-$(mktemp -d)}
hosts=$root/tests/cluster/hosts.sh
[[ ${1:-} != -* ]] || { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" && exit 2; }
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

train() { # on the head: the launcher for both hosts
  PDSH_SSH_ARGS_APPEND="-F $dir/ssh_config" GLOO_SOCKET_IFNAME=eth0 OMP_NUM_THREADS=1 \
    "$hosts" on head "$dir" timeout 500 "$root/launch.sh" --hostfile "$dir/hostfile" \
    --recipe pipeline/recipes/rmae.yaml --ds_config ds_configs/zero2.json --data "$dir/train" \
    --output "$dir/run" --set encoder.arch=vit_tiny_patch16_224 --set encoder.image_size=16 \
    --set 'encoder.options={patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2}' \
    --set 'measure.decoder={width: 8, depth: 1, heads: 2}' --set batch_size=8 --set data.partitions=4 \
    --set data.workers=0 --set monitor.log_steps=1 --set monitor.save_steps=100 \
    --set optimizer.epochs=100 --set optimizer.warmup_epochs=1 "$@"
}

train --max-steps 1200 >"$dir/first.log" 2>&1 &
run=$!
until [[ -d $dir/run/checkpoints/step-00000200 ]]; do
  kill -0 "$run" || { cat "$dir/first.log" && exit 1; }
  sleep 0.2
done
"$hosts" kill node2 "$dir"
begun=$SECONDS code=0
wait "$run" || code=$?
echo "node2 killed: launch.sh ended with $code in $((SECONDS - begun)) s"
((code != 0 && code != 85 && SECONDS - begun < 120)) || { cat "$dir/first.log" && exit 1; }
left=$(pgrep -fc "pretrain.py .*$dir/run" || true)
echo "ranks left on the other host: $left"
[[ $left == 0 ]] || exit 1

"$hosts" down "$dir" && "$hosts" up "$dir" # the machine comes back
last=$(sed 's/step-0*//' "$dir/run/checkpoints/latest")
train --max-steps $((last + 20)) >"$dir/second.log" 2>&1 || { cat "$dir/second.log" && exit 1; }
grep -h 'the last start failed\|resumed:\|^done:' "$dir/second.log"
echo "passed: gone on from step $last"
