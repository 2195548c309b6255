#!/usr/bin/env bash
# Start training or an evaluation: one node, a hostfile, Slurm, torchrun or Kubernetes (bash >= 4.4).
# Every rank sees RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
set -uo pipefail

launched=$(date +%s.%N)
PREEMPTED=85 # the trainer's exit code for "asked to stop: the step is finished and saved"
root=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
host=$(hostname)
ranks='' hostfile='' script=$root/pipeline/pretrain.py grace=300 output='' stopping='' started='' mode=node
requeue=yes job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID:-}}
job=${job:-${SLURM_JOB_ID:-}} # of an array its task: the number alone may mean the whole array
arguments=() pids=() hosts=() ssh_options=()

usage() {
  cat <<'END'
usage: launch.sh [--ranks N] [--hostfile FILE] [--script FILE] [--grace SECONDS] [--no-requeue] [ARGUMENT …]
       launch.sh --check [--output FOLDER]   what this machine has for a run, and what each lack costs

Starts pipeline/pretrain.py, or another --script, once per rank; every other ARGUMENT goes to it
(after `--` also those that launch.sh would take). How it starts depends on where it is called:

  one node              one rank per GPU, or one on the CPU; --ranks N says otherwise
  --hostfile FILE       the nodes of a DeepSpeed hostfile (lines `name slots=N`), over pdsh and ssh
  in a Slurm job        starts itself with srun; an sbatch script that exports
                        RELAXMIM_BATCH=$SLURM_JOB_ID is requeued when it was preempted, unless by
                        Ctrl-C, scancel or with --no-requeue
  in srun               a task is a rank; with one task per node, the ranks of that node
  RANK, WORLD_SIZE set  with LOCAL_RANK (torchrun): this one rank; without it (Kubernetes
                        PyTorchJob): the ranks of node RANK of WORLD_SIZE nodes

SIGTERM and SIGUSR1 are forwarded to every rank, which saves and exits with 85; Ctrl-C and the end of the
terminal (SIGHUP, unless under nohup) do the same, a second Ctrl-C kills. Ranks that are still alive after
--grace seconds (300) are killed.
Exit code: 0 done, 2 something is missing (one sentence says what), 75 a rank made no progress
(watchdog_seconds of the ds_config), 76 losses or gradients are not finite, 85 preempted: rerun the
same command to resume; otherwise that of the first rank that failed.
See docs/cluster.md.
END
}

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

need_number() { # NAME VALUE LEAST [MOST]
  [[ $2 =~ ^(0|[1-9][0-9]{0,5})$ && $2 -ge $3 && $2 -le ${4:-999999} ]] ||
    fail "$1 is '$2': must be a number from $3 ${4:+to }${4:-up}"
}

expand_home() { # PATH: with the home folder for its ~, which the shell leaves after a =
  local home=~ # also where HOME is not set
  # shellcheck disable=SC2088
  [[ $1 == '~' || $1 == '~/'* ]] && printf %s "$home${1:1}" || printf %s "$1"
}

free_port() { # one that nobody listens on, outside the range of outgoing connections
  "$python" -c 'import random, socket
for port in random.sample(range(20000, 32000), 12000):
    with socket.socket() as s:
        try: s.bind(("", port))
        except OSError: continue
    print(port)
    break'
}

choose_python() { # of the active environment, of .venv here, or on PATH (a container)
  for python in ${VIRTUAL_ENV:+"$VIRTUAL_ENV/bin/python"} "$root/.venv/bin/python" "$(type -P python3)"; do
    [[ -x $python ]] && break
  done
}

find_python() {
  choose_python
  "$python" -c 'import sys, importlib.util as u; sys.exit(not u.find_spec("deepspeed"))' 2>/dev/null ||
    fail "${python:-python3} has no deepspeed: run 'make setup' in $root or activate its environment"
  export PATH="${python%/*}:$PATH" # deepspeed and ninja are beside it
}

count_gpus() { # that this process may use; the deepspeed launcher numbers devices on a CPU too
  local all
  if type -P nvidia-smi >/dev/null; then
    # Where there are slices (MIG), CUDA shows a process one of them.
    all=$(nvidia-smi -L 2>/dev/null | awk '/^GPU /{n++} /^ *MIG /{n=1; exit} END{print n+0}')
  else # a container may have the devices without the tool
    all=$(compgen -G '/dev/nvidia[0-9]*' | wc -l)
  fi
  [[ ${DS_ACCELERATOR:-} != cpu ]] || all=0
  if [[ $all == 0 || -z ${CUDA_VISIBLE_DEVICES+set} ]]; then
    echo "$all"
  else
    # CUDA takes those before the first that is none: -1, or Slurm's NoDevFiles.
    tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | sed -E '/^ *(-|NoDevFiles)/,$d' | grep -c '[^[:space:]]'
  fi
}

check_interface() { # VARIABLE: what it names is a network interface of this host
  local value=${!1:-} name have end=''
  [[ -z $value || $value == ^* ]] && return
  have=" $(tail -n +3 /proc/net/dev | cut -d: -f1 | xargs) "
  for name in ${value//,/ }; do
    [[ $1 == GLOO* || $name == =* ]] && end=' ' # NCCL takes a prefix, unless = comes first
    name=${name#=}
    [[ $have == *" ${name%%:*}$end"* ]] || fail "$1=$value: $host has no such interface (it has:$have)"
  done
}

check_hosts() { # NODE: what the ranks of several hosts need; node 0 leaves a note in --output
  local note=$output/.launch key tries said=''
  [[ -n ${MASTER_ADDR:-} && -n ${MASTER_PORT:-} ]] ||
    fail "MASTER_ADDR and MASTER_PORT are not both set: they say where rank 0 listens"
  key=${RELAXMIM_RUN:-$MASTER_ADDR:$MASTER_PORT}
  getent hosts "$MASTER_ADDR" >/dev/null || fail "$host cannot resolve MASTER_ADDR=$MASTER_ADDR"
  check_interface NCCL_SOCKET_IFNAME
  check_interface GLOO_SOCKET_IFNAME
  # Beside NCCL too, the ranks agree on small things over gloo.
  [[ -n ${GLOO_SOCKET_IFNAME:-} || $(getent ahostsv4 "$host") != 127.* ||
    $(getent ahostsv4 "$MASTER_ADDR") == 127.* ]] ||
    fail "$host resolves to a loopback address: set GLOO_SOCKET_IFNAME to the interface of the ranks"
  [[ -n $output ]] || return 0
  [[ $1 != 0 ]] || { mkdir -p "$output" && echo "$key $WORLD_SIZE" >"$note"; } ||
    fail "--output $output: cannot be written"
  for ((tries = 0; tries < 60; tries++)); do # a note of the start before may be there
    said=$(cat "$note" 2>/dev/null)
    [[ $said == "$key $WORLD_SIZE" ]] && return
    sleep 1
  done
  [[ $said != "$key "* ]] ||
    fail "$host counts $WORLD_SIZE ranks on all hosts together, node 0 ${said##* }: every host must start as many (does one lack a GPU? --ranks N on each says how many)"
  fail "--output $output: $host does not see what node 0 wrote; the folder must be shared by all hosts"
}

prepare() { # RANKS NODE: checks and settings of each rank, when RANKS of WORLD_SIZE are on this node
  local cores
  cores=$("$python" "$root/shard_tools/cores.py" 2>/dev/null || nproc) # affinity and cgroups
  (($1 == WORLD_SIZE)) || check_hosts "$2"
  export RELAXMIM_LAUNCHED=$launched LOCAL_WORLD_SIZE=$1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > $1 ? cores / $1 : 1))}
  [[ ${DS_ACCELERATOR:-} != cpu ]] || export CUDA_VISIBLE_DEVICES= # torch would use those that it sees
  [[ $gpus == 0 ]] && export DS_ACCELERATOR=cpu
  command=("$python" -u "$script" "${arguments[@]}")
  # A rank whose parent is killed stops as if preempted, instead of living on alone.
  type -P setpriv >/dev/null && command=(setpriv --pdeathsig TERM "${command[@]}")
}

run_rank() { # become this one rank
  local here
  need_number WORLD_SIZE "${WORLD_SIZE:-}" 1
  need_number RANK "${RANK:-}" 0 $((WORLD_SIZE - 1))
  need_number LOCAL_RANK "$LOCAL_RANK" 0
  here=${LOCAL_WORLD_SIZE:-${LOCAL_SIZE:-$WORLD_SIZE}}
  [[ ${ranks:-$here} == "$here" ]] ||
    fail "--ranks $ranks: another launcher starts $here on $host (LOCAL_RANK or srun's tasks say so); leave it out"
  prepare "$here" "$RANK"
  exec "${command[@]}"
}

run_node() { # NODE NODES: start the ranks of one node and watch over them
  local i
  ranks=${ranks:-$((gpus ? gpus : 1))}
  ((gpus == 0 || ranks <= gpus)) || fail "--ranks $ranks: $host has only $gpus GPUs"
  [[ $2 != 1 ]] || MASTER_ADDR=127.0.0.1 MASTER_PORT=${MASTER_PORT:-$(free_port)}
  export MASTER_ADDR MASTER_PORT WORLD_SIZE=$((ranks * $2))
  prepare "$ranks" "$1"
  started=yes
  for ((i = 0; i < ranks; i++)); do
    RANK=$(($1 * ranks + i)) LOCAL_RANK=$i setsid "${command[@]}" &
    pids[i]=$!
  done
  watch_over
}

send() { # SIGNAL: to every rank
  local pid
  case $mode:$1 in
    hosts:*) on_hosts "$root/launch.sh" --signal "$1" "$run" ;;
    sbatch:KILL) scancel --signal=KILL "$job" ;;
    *:KILL) for pid in "${pids[@]}"; do kill -KILL -- "-$pid"; done ;;
    *) kill -s "$1" "${pids[@]}" ;;
  esac 2>/dev/null
}

stop() { # SIGNAL REASON
  if [[ -z $started ]]; then
    printf '%s: stopped before the ranks were started\n' "$2" >&2
    exit "$PREEMPTED"
  elif [[ -n $stopping && $2 == SIGINT ]]; then
    send KILL >/dev/null
  else
    [[ -n $stopping ]] || printf '%s: the ranks finish their step and save\n' "$2" >&2
    stopping=$1
    [[ $2 != SIGINT ]] || requeue='' # somebody stopped it
    send "$1" >/dev/null
  fi
}

watch_over() { # wait for all of pids; the first failure ends the others in bounded time
  local i code=0 rc ending='' deadline='' links most=0 late='' again
  sleep 0.3 # a signal while they were being started may have missed some
  [[ -z $stopping ]] || send "$stopping" >/dev/null
  again=$((SECONDS + 10))
  while ((${#pids[@]})); do
    for i in "${!pids[@]}"; do
      kill -0 "${pids[i]}" 2>/dev/null && continue
      wait "${pids[i]}" 2>/dev/null
      rc=$?
      kill -KILL -- "-${pids[i]}" 2>/dev/null # loader workers that it left
      unset "pids[i]"
      ((rc == 0 || code != 0)) && continue
      code=$rc
      [[ $mode$stopping == node && $rc != "$PREEMPTED" ]] || continue
      # Bad input, or a loss that is not finite, ends every rank by itself, with one line, but for
      # those that wait for others.
      ending=$((SECONDS + 3))
      [[ $rc == 2 || $rc == 76 ]] && continue
      printf 'error: rank %d on %s failed with exit code %d%s; ending the others\n' "$i" "$host" "$rc" "$(reason "$rc")" >&2
      ending=$SECONDS
    done
    if [[ -n $ending ]] && ((SECONDS >= ending && ${#pids[@]})); then
      send TERM
      ending='' deadline=$((SECONDS + 20))
    fi
    if [[ $mode == hosts ]]; then # pdsh holds one ssh per host; the first to end is a failure or the end
      links=$(pgrep -c -x -P "$(pgrep -d, -s "${pids[0]:-0}" || echo 0)" ssh)
      ((links < most)) && deadline=${deadline:-$((SECONDS + 60))}
      ((most = links > most ? links : most))
      if [[ -n $stopping ]] && ((SECONDS >= again)); then # a host may have started its ranks since
        send "$stopping" >/dev/null
        again=$((SECONDS + 10))
      fi
      sleep 1
    fi
    [[ -z $deadline ]] && [[ -n $stopping || $code != 0 ]] && deadline=$((SECONDS + grace))
    if [[ -n $deadline ]] && ((SECONDS >= deadline && ${#pids[@]})); then
      [[ -n $late ]] || printf 'error: some ranks did not end in time; killing them\n' >&2
      late=yes
      send KILL >/dev/null
      deadline=$((SECONDS + 20))
    fi
    sleep 0.3
  done
  # Stopped before the trainer could listen: nothing is lost, so it counts as preempted.
  # (A shell reports signal 15 as 143, the deepspeed launcher as 241.)
  [[ -n $stopping && " 143 138 241 246 " == *" $code "* ]] && code=$PREEMPTED
  return "$code"
}

reason() { # CODE: why the first rank failed, as it told the run's folder, or what the code means
  local note=$output/failure.txt
  if [[ -n $output && -f $note && $(stat -c %Y "$note") -ge $(($(date +%s) - SECONDS)) ]]; then
    printf ' (%s)' "$(head -c 500 "$note" | tr -d '\n')"
  elif [[ $1 == 137 ]]; then
    printf ' (killed: the kernel does so where memory runs out)'
  elif [[ $1 == 75 ]]; then
    printf ' (no progress: see its stack above)'
  fi
}

on_hosts() { # COMMAND …: on every host at once; prints the hosts where it failed
  local name waiting=()
  for name in "${hosts[@]}"; do
    { ssh -n "${ssh_options[@]}" "$name" "$(printf '%q ' "$@")" >/dev/null 2>&1 || echo "$name"; } &
    waiting+=($!)
  done
  wait "${waiting[@]}"
}

run_pids() { # RUN: its ranks and their workers on this host
  grep -lzxF "RELAXMIM_RUN=$1" /proc/[0-9]*/environ 2>/dev/null | cut -d/ -f3 | xargs
}

signal_run() { # SIGNAL RUN: to the run's ranks on this host; KILL: workers too; END: KILL after 15 s
  local all pid parent targets=() tries=0
  while [[ $1 == END && -n $(run_pids "$2") ]] && ((tries++ < 15)); do sleep 1; done
  all=$(run_pids "$2")
  for pid in $all; do
    parent=$(awk '/^PPid:/ {print $2}' "/proc/$pid/status" 2>/dev/null)
    [[ $1 != KILL && $1 != END && " $all " == *" $parent "* ]] || targets+=("$pid")
  done
  # Only now: a worker whose rank has just ended would pass for a rank.
  ((${#targets[@]} == 0)) || kill -s "${1/END/KILL}" "${targets[@]}" 2>/dev/null
  exit 0
}

run_hosts() { # the deepspeed launcher: pdsh, one launcher per host, this script for each rank
  local tool bad words code line='[[:space:]]*[A-Za-z0-9._-]+[[:space:]]+slots=[1-9][0-9]*[[:space:]]*'
  [[ -r $hostfile ]] || fail "--hostfile $hostfile: no such file"
  mapfile -t hosts < <(sed -nE 's/^[[:space:]]*([^#[:space:]]+).*/\1/p' "$hostfile")
  bad=$(grep -vE "^($line|[[:space:]]*)(#.*)?$" "$hostfile" | head -n 1)
  [[ -z $bad && ${#hosts[@]} -gt 0 ]] || fail "--hostfile $hostfile: '$bad' is not a line like 'node1 slots=8'"
  bad=$(printf '%s\n' "${hosts[@]}" | sort | uniq -d | head -n 1)
  [[ -z $bad ]] || fail "--hostfile $hostfile: $bad is in it twice; give all its slots in one line"
  for tool in ssh pdsh deepspeed; do
    type -P "$tool" >/dev/null || fail "$tool is not on PATH; --hostfile needs it"
  done
  # A host that falls silent is given up after 15 s.
  export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} -o BatchMode=yes -o ConnectTimeout=5\
 -o ServerAliveInterval=5 -o ServerAliveCountMax=3"
  read -ra ssh_options <<<"$PDSH_SSH_ARGS_APPEND"
  bad=$(on_hosts true | xargs)
  [[ -z $bad ]] || fail "no ssh without a password to: $bad"
  bad=$(on_hosts test -x "$root/launch.sh" -a -x "$python" -a -d "$PWD" | xargs)
  [[ -z $bad ]] || fail "$root, $python and $PWD must be at the same place on every host; not so on: $bad"
  run=$host-$$-$(date +%s)
  mapfile -t words < <(env | grep -E '^((NCCL|GLOO|TORCH|FI|UCX)_[A-Z0-9_]*|OMP_NUM_THREADS|DS_ACCELERATOR)=')
  words+=("RELAXMIM_RUN=$run" "$root/launch.sh" --script "$script" -- "${arguments[@]}")
  [[ $gpus == 0 ]] && export DS_ACCELERATOR=cpu # for the launcher here; each host looks for itself
  started=yes
  # pdsh and ssh each let a shell read the words again, so they travel as one.
  setsid deepspeed -q --hostfile "$hostfile" --launcher pdsh --force_multi \
    --no_ssh_check --no_python --no_local_rank --master_addr "${MASTER_ADDR:-${hosts[0]}}" \
    --master_port "${MASTER_PORT:-29500}" "$root/launch.sh" --decode "$(printf '%s\0' "${words[@]}" | base64 -w 0)" \
    > >(grep --line-buffered -vE '\[(launch|real_accelerator)\.py:') &
  pids=($!)
  watch_over
  code=$?
  [[ $code == 0 ]] || bad=$(send END | xargs) # ranks that another host's failure left
  [[ -z $bad ]] || printf 'error: not reached, may still hold ranks: %s\n' "$bad" >&2
  return "$code"
}

run_sbatch() { # on the first node of the job: one srun for all; requeue when preempted
  local code
  started=yes # a signal from now on requeues
  [[ $script != */pipeline/pretrain.py || -n $output ]] ||
    fail "give --output FOLDER: a requeued job finds its checkpoints there"
  setsid srun --wait=60 "$root/launch.sh" ${ranks:+--ranks "$ranks"} --grace "$grace" \
    --script "$script" -- "${arguments[@]}" &
  pids=($!)
  watch_over
  code=$?
  [[ $code != "$PREEMPTED" || -z $requeue ]] || requeue_job
  return "$code"
}

requeue_job() { # only a batch script that said it is ours, and not where the job was cancelled
  if [[ ${RELAXMIM_BATCH:-} != "$SLURM_JOB_ID" ]]; then # also that of another job, inherited
    printf "job %s is not requeued: its batch script does not export RELAXMIM_BATCH=\$SLURM_JOB_ID\n" "$job" >&2
  elif [[ $(scontrol show job -o "$job" 2>/dev/null) == *JobState=CANCELLED* ]]; then
    printf 'job %s was cancelled and is not requeued\n' "$job" >&2
  else
    scontrol requeue "$job" || printf 'error: job %s cannot be requeued: submit it again to resume\n' "$job" >&2
  fi
}

run_srun() { # SLURM_* to the names that every rank knows
  local per_node=${SLURM_STEP_TASKS_PER_NODE:-1}
  # The first of node[07-09,12],gpu3; a container has no scontrol to ask.
  MASTER_ADDR=${MASTER_ADDR:-$(sed -E 's/\[([0-9]+)[^]]*\]/\1/g; s/,.*//' <<<"${SLURM_STEP_NODELIST:-}")}
  # Steps of a job may run side by side; for a lone task run_node finds a port.
  [[ $SLURM_STEP_NUM_TASKS == 1 ]] ||
    MASTER_PORT=${MASTER_PORT:-$((15000 + (SLURM_JOB_ID + 1009 * SLURM_STEP_ID) % 15000))}
  export MASTER_ADDR MASTER_PORT RELAXMIM_RUN="$SLURM_JOB_ID.$SLURM_STEP_ID.${SLURM_RESTART_COUNT:-0}"
  [[ $per_node != *,* ]] || fail "$per_node tasks on the nodes: must be as many on each (--ntasks-per-node)"
  if [[ ${per_node%%(*} == 1 ]]; then
    run_node "$SLURM_NODEID" "$SLURM_STEP_NUM_NODES"
  else
    # A task has cores of its own, which the others do not share.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_STEP_NUM_TASKS LOCAL_WORLD_SIZE=${per_node%%(*}
    LOCAL_RANK=$((gpus ? SLURM_LOCALID % gpus : SLURM_LOCALID)) # a task may see only its own GPU
    export LOCAL_RANK && run_rank
  fi
}

in_step() { # a task of srun; a batch script and salloc's shell may have SLURM_STEP_* too
  local parent
  [[ -n ${SLURM_STEP_NUM_TASKS:-} ]] || return
  parent=$(awk '/^PPid:/ {print $2}' "/proc/${SLURM_TASK_PID:-0}/status" 2>/dev/null)
  ! grep -qzE '^slurmstepd: \[[0-9]+\.(batch|interactive)\]' "/proc/${parent:-0}/cmdline" 2>/dev/null
}

case ${1:-} in
  -h | --help) usage && exit ;;
  --check) choose_python && PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "$python" -m pipeline.doctor "${@:2}" ;;
  --signal) signal_run "$2" "$3" ;;
  --decode) mapfile -d '' -t arguments < <(base64 -d <<<"$2") && exec env "${arguments[@]}" ;;
esac
while (($#)); do
  case $1 in
    --) arguments+=("${@:2}") && break ;;
    --no-requeue) requeue='' ;;
    --ranks=* | --hostfile=* | --script=* | --grace=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" && continue ;;
    --ranks | --hostfile | --script | --grace)
      (($# > 1)) || fail "$1 needs a value"
      [[ -n $2 ]] || fail "$1 is given as an empty text; is a shell variable unset?"
      printf -v "${1#--}" %s "$2" && shift ;;
    *) arguments+=("$1") ;;
  esac
  shift
done
hostfile=$(expand_home "$hostfile") script=$(expand_home "$script")
[[ -z $ranks ]] || need_number --ranks "$ranks" 1
need_number --grace "$grace" 0
[[ -z $hostfile || -z $ranks ]] || fail "--ranks $ranks does nothing with --hostfile, whose slots say how many; leave it out"
[[ -f $script ]] || script=$root/$script
[[ -f $script ]] || fail "--script ${script#"$root/"}: no such file"
if [[ $script == */pipeline/pretrain.py ]]; then
  for ((i = 0; i < ${#arguments[@]}; i++)); do
    [[ ${arguments[i]} =~ ^--output(=(.*))?$ ]] && output=${BASH_REMATCH[2]:-${arguments[i + 1]:-}}
  done
  output=$(expand_home "$output")
fi
find_python
gpus=$(count_gpus)
trap 'stop TERM SIGTERM' TERM
trap 'stop USR1 SIGUSR1' USR1
trap 'stop TERM SIGHUP' HUP
trap 'stop TERM SIGINT' INT

if [[ -n $hostfile ]]; then
  mode=hosts && run_hosts
elif in_step && [[ -z ${LOCAL_WORLD_SIZE:-${LOCAL_SIZE:-}} ]]; then
  run_srun # also where enroot's hook, or a script, has made LOCAL_RANK of SLURM_LOCALID
elif [[ -n ${LOCAL_RANK:-} ]]; then
  run_rank
elif [[ ${OMPI_COMM_WORLD_SIZE:-1} != 1 ]]; then
  fail "mpirun has started launch.sh $OMPI_COMM_WORLD_SIZE times; start it once, with --hostfile, or by srun"
elif [[ -n ${SLURM_JOB_ID:-} ]]; then
  mode=sbatch && run_sbatch
elif [[ -n ${PET_NODE_RANK:-${RANK:-}} ]]; then
  node=${PET_NODE_RANK:-$RANK} nodes=${PET_NNODES:-${WORLD_SIZE:-}}
  MASTER_ADDR=${MASTER_ADDR:-${PET_MASTER_ADDR:-}} MASTER_PORT=${MASTER_PORT:-${PET_MASTER_PORT:-29500}}
  need_number "WORLD_SIZE (the nodes, without LOCAL_RANK)" "$nodes" 1
  need_number "RANK (a node's, without LOCAL_RANK)" "$node" 0 $((nodes - 1))
  run_node "$node" "$nodes"
else
  run_node 0 1
fi
