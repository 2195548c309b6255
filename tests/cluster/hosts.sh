#!/usr/bin/env bash
# Two hosts and a head on one machine, out of namespaces; root is needed, nothing outside changes.
#
#   hosts.sh up DIR             start node1, node2 (network, UTS, PID, /dev/shm and sshd of their own)
#   hosts.sh on NAME DIR CMD …  run a command on node1, node2 or head
#   hosts.sh kill NAME DIR      kill every process of a host at once
#   hosts.sh cut|join NAME DIR  take its network cable out, or put it back
#   hosts.sh down DIR           end both hosts and remove the namespaces
#
# DIR gets ssh_config, hostfile and logs. Debian packages: iproute2 openssh-server openssh-client.
set -euo pipefail

number() { case $1 in head) echo 254 ;; node1) echo 1 ;; node2) echo 2 ;; *) exit 2 ;; esac }

namespace() { # NAME: a network namespace on the head's bridge, with names for all three
  ip netns add "rmim-$1"
  ip -n "rmim-$1" link set lo up
  mkdir -p "/etc/netns/rmim-$1"
  printf '127.0.0.1 localhost\n10.77.0.1 node1\n10.77.0.2 node2\n10.77.0.254 head\n' >"/etc/netns/rmim-$1/hosts"
}

boot() { # NAME: its processes, below an sshd that is process 1
  cat >"$dir/sshd_$1" <<END
Port 2222
ListenAddress 10.77.0.$(number "$1")
HostKey $dir/host_key
AuthorizedKeysFile $dir/key.pub
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
PidFile none
END
  setsid ip netns exec "rmim-$1" unshare --uts --pid --ipc --mount --fork --kill-child --mount-proc bash -c "
    hostname $1; mount -t tmpfs tmpfs /dev/shm; exec $(type -P sshd) -D -f $dir/sshd_$1 -E $dir/sshd_$1.log" \
    </dev/null >/dev/null 2>&1 &
  echo $! >"$dir/$1.pid"
}

up() {
  local name
  mkdir -p "$dir" /run/sshd
  [[ -f $dir/key ]] || ssh-keygen -q -t ed25519 -N '' -f "$dir/key"
  [[ -f $dir/host_key ]] || ssh-keygen -q -t ed25519 -N '' -f "$dir/host_key"
  namespace head
  ip -n rmim-head link add bridge type bridge
  ip -n rmim-head addr add 10.77.0.254/24 dev bridge
  ip -n rmim-head link set bridge up
  for name in node1 node2; do
    namespace "$name"
    ip link add "$name" netns rmim-head type veth peer name eth0 netns "rmim-$name"
    ip -n rmim-head link set "$name" master bridge up
    ip -n "rmim-$name" addr add "10.77.0.$(number "$name")/24" dev eth0
    ip -n "rmim-$name" link set eth0 up
    boot "$name"
  done
  cat >"$dir/ssh_config" <<END
Host node1 node2
  Port 2222
  IdentityFile $dir/key
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
END
  printf 'node1 slots=1\nnode2 slots=1\n' >"$dir/hostfile"
  for name in node1 node2; do
    for _ in {1..50}; do
      ip netns exec rmim-head ssh -F "$dir/ssh_config" -o BatchMode=yes "$name" true 2>/dev/null && continue 2
      sleep 0.2
    done
    echo "error: $name does not answer over ssh; see $dir/sshd_$name.log" >&2
    exit 1
  done
}

on() { # NAME CMD …
  local name=$1
  shift
  if [[ $name == head ]]; then
    exec ip netns exec rmim-head unshare --uts bash -c 'hostname head; exec "$@"' - "$@"
  fi
  exec nsenter --target "$(pgrep -P "$(<"$dir/$name.pid")")" --all --wdns="$PWD" "$@"
}

down() {
  local name
  for name in node1 node2; do
    [[ ! -f $dir/$name.pid ]] || kill -KILL "$(<"$dir/$name.pid")" 2>/dev/null || true
    rm -f "$dir/$name.pid"
  done
  for name in node1 node2 head; do
    ip netns del "rmim-$name" 2>/dev/null || true
    rm -rf "/etc/netns/rmim-$name"
  done
}

command=$1
case $command in
  up | down) dir=$2 && "$command" ;;
  on) dir=$3 && on "$2" "${@:4}" ;;
  kill) dir=$3 && kill -KILL "$(<"$dir/$2.pid")" && rm "$dir/$2.pid" ;;
  cut) ip -n rmim-head link set "$2" down ;;
  join) ip -n rmim-head link set "$2" up ;;
  *) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" && exit 2 ;;
esac
