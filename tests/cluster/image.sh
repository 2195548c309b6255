#!/usr/bin/env bash
# Build the CPU image with no daemon and no registry; root is needed.
#
#   image.sh DIR [BUILDAH OPTION …]   Debian's base by mmdebstrap, then the Dockerfile by buildah
#
# DIR keeps the base and the images; the result is localhost/relaxmim:cpu in DIR/storage.
# Debian packages: mmdebstrap buildah. Options that a closed network needs go to buildah, e.g.
#   -v /etc/pip.conf:/etc/pip.conf:ro --build-arg TORCH_INDEX=
set -euo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
dir=$1
storage=(--root "$dir/storage" --runroot "$dir/run")
mkdir -p "$dir"
[[ -f $dir/base.tar ]] || {
  mmdebstrap --quiet --variant=minbase --include=ca-certificates bookworm "$dir/base.new" "${DEBIAN_MIRROR:-http://deb.debian.org/debian}"
  mv "$dir/base.new" "$dir/base.tar"
}
if ! buildah "${storage[@]}" inspect --type image localhost/debian:bookworm >/dev/null 2>&1; then
  base=$(buildah "${storage[@]}" from scratch)
  buildah "${storage[@]}" add --quiet "$base" "$dir/base.tar" / >/dev/null
  buildah "${storage[@]}" config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$base"
  buildah "${storage[@]}" commit --quiet --rm "$base" localhost/debian:bookworm >/dev/null
fi
# Docker format: the OCI one has no SHELL. No --layers: each would be a whole copy where there is no overlay.
exec buildah "${storage[@]}" bud --format docker --isolation chroot --network host --pull-never \
  --build-arg BASE=localhost/debian:bookworm --build-arg VARIANT=cpu "${@:2}" \
  -f "$root/Dockerfile" -t localhost/relaxmim:cpu "$root"
