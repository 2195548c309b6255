#!/usr/bin/env bash
# Both README commands in bare roots that mmdebstrap makes: set-up, a small demo, some tests; then
# all of it again without a network, and a start of DeepSpeed without compiler, ninja and numactl.
#
#   fresh.sh [--write FILE] [--keep] [--full] [SYSTEM:COMPILER:USER[:interrupt] …]
#
#   SYSTEM     bookworm (Debian 12), noble (Ubuntu 24.04), trixie (Debian 13)
#   COMPILER   none, cc (what set-up asks for), or part (build-essential alone)
#   USER       root or user
#   --full     the whole suite instead of some tests (with a network)
#   interrupt  set-up is stopped in every stage, by Ctrl-C and by kill -9, and run again
#
# The host's pip configuration (indexes, folders of wheels, certificates) is used in the roots; its
# packages and caches are not. FRESH_DIR is where the roots are (8 GB each, one at a time; a
# temporary folder), UBUNTU_KEYRING a folder with Ubuntu's keys. What is tested is the last commit.
# Exit 0 also where it is skipped, with the reason.
set -euo pipefail

repository=$(cd "$(dirname "$0")/../.." && pwd)
usage() { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" && exit 2; }
few='make test JOBS=1 TESTS="tests/system/test_setup.py tests/pipeline/config/test_recipe.py tests/pipeline/data/test_jpeg.py tests/shard_tools/sharding/test_images.py"'
tests=$few write='' keep='' cases=()
while (($#)); do
  case $1 in
    --write) write=${2:?--write needs a file} && shift ;;
    --keep) keep=1 ;;
    --full) tests='make test JOBS=2' ;;
    -*) usage ;;
    *) cases+=("$1") ;;
  esac
  shift
done
# Each system, with and without a compiler, as root and as a user: every pair of the three is there.
((${#cases[@]})) || cases=(bookworm:cc:root:interrupt noble:none:user noble:cc:root trixie:cc:user
  trixie:none:root bookworm:part:user bookworm:none:root)
[[ $(id -u) == 0 ]] || { echo "skipped: needs root, for chroots and namespaces" && exit; }
for tool in mmdebstrap unshare chroot git ip; do
  type -P "$tool" >/dev/null || { echo "skipped: needs $tool" && exit; }
done
base=${FRESH_DIR:-$(mktemp -d)}
mkdir -p "$base"
base=$(cd "$base" && pwd)
root='' table=()
mapfile -t pip_settings < <(python3 -m pip config list 2>/dev/null)

clean() {
  [[ -z $root || -n $keep ]] || rm -rf --one-file-system "$root"
  [[ -n ${FRESH_DIR:-} ]] || rm -rf --one-file-system "$base"
}
# shellcheck disable=SC2317 # reached by the trap
trap clean EXIT

# ---------------------------------------------------------------- a root

bare() { # SYSTEM: its tar, made once: minbase and what the README's first line needs
  local tar=$base/$1.tar from=()
  [[ -s $tar ]] && return
  [[ $1 != noble ]] || from=("--components=main universe" "--keyring=${UBUNTU_KEYRING:-/usr/share/keyrings}")
  [[ $1 != noble ]] || from+=(noble "$tar.part.tar" http://archive.ubuntu.com/ubuntu)
  ((${#from[@]})) || from=("$1" "$tar.part.tar")
  mmdebstrap --quiet --variant=minbase --include=apt,git,make,python3,python3-venv,ca-certificates \
    "${from[@]}" && mv "$tar.part.tar" "$tar"
}

pip_files() { # the folders and files on this host that pip's settings name; an index with its siblings
  printf '%s\n' "${pip_settings[@]}" | grep -oE "(file://)?/[^' ]+" |
    sed -E 's,^file://(.*)/simple/?$,\1,; s,^file://,,' | sort -u |
    while read -r path; do [[ ! -e $path ]] || echo "$path"; done
}

make_root() { # SYSTEM COMPILER USER → $root
  local line name packages
  bare "$1"
  root=$base/root
  rm -rf --one-file-system "$root"
  mkdir -p "$root"
  tar -xf "$base/$1.tar" -C "$root" --exclude='./dev/*'
  cp /etc/resolv.conf "$root/etc/resolv.conf"
  printf '127.0.0.1 localhost %s\n' "$(hostname)" >"$root/etc/hosts"
  {
    echo '[global]'
    for line in "${pip_settings[@]}"; do
      name=${line%%=*}
      printf '%s = %s\n' "${name##*.}" "$(sed "s/^'//; s/'$//" <<<"${line#*=}")"
    done | awk -F' = ' '!seen[$1]++'
  } >"$root/etc/pip.conf"
  case $2 in
    cc) packages=$(sed -n 's/^    "[A-Za-z./]*": "\([a-z0-9-]*-dev\)",$/\1/p' "$repository/.ci/setup_builds.py" | paste -sd" ") ;;
    *) packages='' ;;
  esac
  if [[ $2 != none ]]; then
    inside root host "apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y \
      --no-install-recommends build-essential $packages" >"$base/apt.log" 2>&1 ||
      { tail "$base/apt.log" && return 1; }
  fi
  inside root host 'useradd --create-home --uid 1234 user'
  git clone -q --no-hardlinks "$repository" "$root/home/user/relaxmim"
  git -C "$root/home/user/relaxmim" checkout -q --detach "$(git -C "$repository" rev-parse HEAD)"
  [[ $3 == root ]] || chroot "$root" chown -R user:user /home/user/relaxmim
  [[ $3 != root ]] || chroot "$root" chown -R root:root /home/user/relaxmim
}

inside() { # USER host|offline COMMAND: in the checkout, in namespaces of its own
  local network=()
  [[ $2 == host ]] || network=(--net)
  local path mounts=''
  while read -r path; do
    if [[ -d $path ]]; then mkdir -p "$root$path"; else mkdir -p "$root${path%/*}" && touch "$root$path"; fi
    mounts+="mount --bind -o ro '$path' '$root$path'; "
  done < <(pip_files)
  local home=/root
  [[ $1 == root ]] || home=/home/user
  unshare --mount --pid --ipc --fork --kill-child "${network[@]}" bash -c "set -e
    ip link set lo up
    mount --make-rprivate /
    mount -t proc proc '$root/proc'
    mount --rbind /dev '$root/dev'
    mount -t tmpfs tmpfs '$root/dev/shm'
    $mounts
    exec chroot --userspec=$1:$1 '$root' env -i --default-signal=INT,QUIT HOME=$home USER=$1 LANG=C.UTF-8 TERM=dumb \
      PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
      bash -c 'test ! -d /home/user/relaxmim || cd /home/user/relaxmim; eval \"\$1\"' - \"\$1\"" - "$3"
}

# ---------------------------------------------------------------- what is done in it

demo='make demo DEMO="--train 256 --val 64 --ranks 2 --set optimizer.epochs=2 --set optimizer.warmup_epochs=0"'

step() { # NAME USER host|offline COMMAND → $seconds; the case's log keeps the output
  local begun=$SECONDS
  printf '\n==== %s: %s\n' "$1" "$4" >>"$log"
  if ! inside "$2" "$3" "$4" >>"$log" 2>&1; then
    failed="$1 failed"
    tail -n 30 "$log"
    return 1
  fi
  seconds=$((SECONDS - begun))
}

interrupted() { # USER: stop set-up in each stage, by Ctrl-C (to make's group) and by kill -9
  # shellcheck disable=SC2016 # expanded inside
  step interrupted "$1" host 'set -m; for stage in 1 2 3 4 5; do for signal in INT KILL; do
    make setup >/tmp/out 2>&1 & run=$!
    until grep -q "^\[$stage/5\]" /tmp/out || ! kill -0 $run 2>/dev/null; do sleep 0.05; done
    [ $stage = 2 ] || [ $stage = 4 ] && sleep $((stage == 2 ? 40 : 1)) || sleep 0.7
    kill -$signal -- -$run 2>/dev/null || echo "too late"; wait $run; echo "stage $stage, $signal: $?"
    cat /tmp/out; [ "$(grep -c "^\[$stage/5\]" /tmp/out)" = 1 ] || echo "not reached: stage $stage"
  done; done'
}

one() { # SYSTEM:COMPILER:USER[:interrupt]: the steps in order; the first that fails ends the case
  local system compiler user how seconds=0 setup demo_time test_time
  IFS=: read -r system compiler user how <<<"$1"
  make_root "$system" "$compiler" "$user" || { failed="no root" && return; }
  python=$(chroot "$root" python3 -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])')
  [[ -z $how ]] || interrupted "$user" || return 0
  step setup "$user" host 'make setup' || return 0
  setup=$seconds
  step demo "$user" host "$demo" || return 0
  demo_time=$seconds
  step test "$user" host "$tests" || return 0
  test_time=$seconds
  times="$setup | $demo_time | $test_time"
  disk="$(du -sm "$root/home/user/relaxmim/.venv" | cut -f1) + $(du -sm "$root"/{root,home/user}/.cache 2>/dev/null | awk '{s += $1} END {print s + 0}')"
  built=$(cd "$root/home/user/relaxmim/.venv/setup" && tail -qn1 pillow relaxmim ops | sed '/^$/d' | paste -sd, | sed 's/,/, /g')
  step "pip check" "$user" host '.venv/bin/python -m pip check || true; .venv/bin/python -c "
import PIL.features as f
assert all(f.check(n) for n in (\"jpg\", \"zlib\", \"webp\", \"libtiff\"))
import deepspeed, pipeline.data.jpeg, torch; torch.ones(2).add(1)"' || return 0
  step offline "$user" offline "make setup && rm -rf runs data && $demo && $few" || return 0
  offline=$seconds
  if [[ $compiler == none ]]; then # nor ninja; numactl is in no root
    step "DeepSpeed without ninja" "$user" offline 'mv .venv/bin/ninja /tmp/ninja
      .venv/bin/deepspeed pipeline/pretrain.py --ds_config ds_configs/zero2.json --max-steps 2 \
        --recipe pipeline/recipes/demo_rmae.yaml --data data/demo/shards/train --output runs/bare \
        --set batch_size=8 2>&1
      mv /tmp/ninja .venv/bin/ninja; grep "torch.s fused AdamW" runs/bare/log.txt
      test -d runs/bare/checkpoints/step-00000002' || return 0
  fi
}

commit=$(git -C "$repository" rev-parse --short HEAD)
status=0
for case in "${cases[@]}"; do
  log=$base/${case//:/-}.log failed='' times='– | – | –' disk=– built=– offline=– python=–
  : >"$log"
  echo "== $case (log: $log)"
  one "$case" || failed=${failed:-"failed"}
  [[ -z $failed ]] || status=1
  row="| ${case//:/ | } $([[ $case == *:interrupt ]] || echo '| ')| $python | $times | $offline | $disk | ${built:-wheels only} | ${failed:-works} |"
  table+=("$row")
  echo "$row"
done
[[ -n $keep ]] || rm -rf --one-file-system "$base/root"

page() {
  printf '%s\n' '| system | compiler | user | stopped | Python | set-up, s | demo, s | tests, s | all again offline, s | .venv + caches, MB | compiled | result |' \
    '|---|---|---|---|---|---|---|---|---|---|---|---|' "${table[@]}"
}
if [[ -n $write ]]; then
  {
    cat <<'EOF'
# Set-up on bare machines

Written by `make test-fresh`, which builds bare systems with mmdebstrap (minbase, apt, git, make,
python3, python3-venv, ca-certificates). Each has its own checkout and shares nothing with the host but
the pip configuration. In each it runs `make setup`, a small `make demo` (256 crops, two epochs, two
ranks) and `make test` for set-up, recipes, JPEG decoding and image checks; then everything again
without a network; and, where there is no compiler, two steps of DeepSpeed without ninja and numactl.

- compiler: "none", "part" (build-essential only) or "cc" (the packages that set-up names)
- stopped: "interrupt" means that set-up was first stopped in each of its five stages, by Ctrl-C and by
  kill -9 of make and set-up, and then run again
EOF
    printf '\n%s, commit %s, %s cores:\n\n' "$(date -u +%F)" "$commit" "$(nproc)"
    page
  } >"$write.part"
  mv "$write.part" "$write"
fi
page
exit $status
