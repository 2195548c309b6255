#!/usr/bin/env bash
# Slurm on the two hosts of hosts.sh: slurmctld on the head, a slurmd on each node, their own munge.
#
#   slurm.sh up DIR      after `hosts.sh up DIR`; then: SLURM_CONF=DIR/slurm.conf hosts.sh on head DIR sbatch …
#   slurm.sh down DIR    end the daemons
#
# Debian packages: slurm-wlm munge.
set -euo pipefail

dir=$2
hosts=$(dirname "$0")/hosts.sh
export SLURM_CONF=$dir/slurm.conf

up() {
  local name
  mkdir -p "$dir/munge" "$dir/state" "$dir/node1" "$dir/node2"
  chmod 755 "$dir/munge"
  rm -rf "$dir/munge/key" "$dir"/state/*
  head -c 1024 /dev/urandom >"$dir/munge/key"
  chmod 400 "$dir/munge/key"
  "$hosts" on head "$dir" munged --force --key-file "$dir/munge/key" --socket "$dir/munge/socket" \
    --pid-file "$dir/munge/pid" --log-file "$dir/munge/log" --seed-file "$dir/munge/seed"
  echo "CgroupPlugin=cgroup/v1" >"$dir/cgroup.conf" # the default looks for a mount that the nodes lack
  cat >"$SLURM_CONF" <<END
ClusterName=relaxmim
SlurmctldHost=head(10.77.0.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket
CredType=cred/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/%n/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/%n/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
MinJobAge=30
KillWait=30
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=node1 NodeAddr=10.77.0.1 CPUs=2 State=UNKNOWN
NodeName=node2 NodeAddr=10.77.0.2 CPUs=2 State=UNKNOWN
PartitionName=low Nodes=node1,node2 Default=YES State=UP PriorityTier=1 GraceTime=60
PartitionName=high Nodes=node1,node2 State=UP PriorityTier=10 PreemptMode=off
END
  "$hosts" on head "$dir" slurmctld -c -f "$SLURM_CONF"
  for name in node1 node2; do
    "$hosts" on "$name" "$dir" slurmd -N "$name" -f "$SLURM_CONF"
  done
  for _ in {1..50}; do
    [[ $("$hosts" on head "$dir" sinfo -h -p low -o %T) == idle ]] && return
    sleep 0.2
  done
  echo "error: the nodes are not idle; see $dir/slurmctld.log" >&2
  exit 1
}

down() {
  local name
  for name in node1 node2; do
    "$hosts" on "$name" "$dir" pkill -x slurmd 2>/dev/null || true
  done
  for name in slurmctld.pid munge/pid; do
    [[ ! -f $dir/$name ]] || kill "$(<"$dir/$name")" || true
  done
}

case $1 in
  up | down) "$1" ;;
  *) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" && exit 2 ;;
esac
