#!/usr/bin/env bash
# Build docs/cluster/apptainer.def on Debian's base, with no container hub, and train five steps in it;
# root is needed. Apptainer itself comes from Debian unstable and runs in a root of its own.
#
#   apptainer.sh DIR [SHARDS]     DIR keeps the root (DIR/root) and the image (DIR/root/w/relaxmim.sif)
#
# Debian packages: mmdebstrap. BINDS="/etc/ssl …" are folders of this machine that a closed network's
# pip and apt need, APT="…" an option of apt for mmdebstrap. 25 GB of disk, a quarter of an hour.
set -euo pipefail

here=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$1"
root=$(cd "$1" && pwd)/root shards=${2:-}
[[ -x $root/usr/bin/apptainer ]] || mmdebstrap --quiet ${APT:+--aptopt="$APT"} --variant=minbase \
  --include=apptainer,squashfuse,debootstrap,ca-certificates,mount sid "$root" "${DEBIAN_MIRROR:-http://deb.debian.org/debian}"
mkdir -p "$root/w/data" "$root/old"
git -C "$here" archive --prefix=relaxmim/ -o "$root/w/relaxmim.tar" HEAD
printf '%s\n' 'Bootstrap: debootstrap' 'OSVersion: bookworm' 'Include: ca-certificates' \
  "MirrorURL: ${DEBIAN_MIRROR:-http://deb.debian.org/debian}" >"$root/w/base.def"
sed -e 's/^Bootstrap: .*/Bootstrap: localimage/' -e 's#^From: .*#From: /w/base#' \
  "$here/docs/cluster/apptainer.def" >"$root/w/relaxmim.def"
[[ -z $shards ]] || cp -r "$shards" "$root/w/data/shards"
cp /etc/resolv.conf /etc/hosts "$root/etc/"

export root BINDS=${BINDS:-}
# shellcheck disable=SC2016 # for the inner shell
exec unshare --mount --propagation private bash -euc '
mount --bind "$root" "$root"
mount --rbind /dev "$root/dev"
mount --rbind /sys "$root/sys"
mount -t proc proc "$root/proc"
options=()
for path in $BINDS; do # only folders: Apptainer makes no file to mount on
  mkdir -p "$root$path"
  mount --rbind "$path" "$root$path"
  options+=(--bind "$path:$path")
done
cd "$root" && pivot_root . old && umount -l old # Apptainer refuses a plain chroot
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
cd /w
if [[ ! -d base ]]; then
  apptainer -q build --sandbox base base.def
  find base/dev \( -type b -o -type c \) -delete # which a user namespace cannot make again
fi
# All capabilities, which Apptainer asks of root and a container may lack, in a namespace of their own.
own=(unshare --user --map-users=0,0,65536 --map-groups=0,0,65536 --mount)
"${own[@]}" apptainer build --force "${options[@]}" relaxmim.sif relaxmim.def
"${own[@]}" apptainer test relaxmim.sif
[[ ! -d data/shards ]] || "${own[@]}" apptainer run --bind /w/data:/data --pwd /data relaxmim.sif \
  --recipe demo_mae --data /data/shards --output /data/runs/demo --max-steps 5
'
