# The image that trains: launch.sh is its entry point, /data the folder for data and runs.
#   CUDA  docker build -t relaxmim .
#   CPU   docker build -t relaxmim:cpu --build-arg BASE=debian:bookworm-slim --build-arg VARIANT=cpu .
# The CUDA release of BASE is the one that the torch of requirements.lock is built with.
ARG BASE=nvidia/cuda:13.0.2-devel-ubuntu24.04
# hadolint ignore=DL3006
FROM ${BASE}
ARG VARIANT=cuda
# Where the CPU build of torch lies; empty: the build of requirements.lock, which is larger.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG CUDA_ARCHITECTURES="8.0;9.0;10.0+PTX"
SHELL ["/bin/bash", "-e", "-o", "pipefail", "-c"]

RUN cc='[0-9]+\.[0-9](\+PTX)?'; [[ "$CUDA_ARCHITECTURES" =~ ^$cc([\;\ ]$cc)*$ ]] || \
    { echo "CUDA_ARCHITECTURES is '$CUDA_ARCHITECTURES': must be like 8.0;9.0+PTX" >&2; exit 2; }

# The compiler and Python's headers stay: Triton compiles for the GPU that it finds.
# hadolint ignore=DL3008
RUN apt-get update && \
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        g++ libjpeg-dev libtiff-dev libwebp-dev openssh-client pdsh procps python3 python3-dev \
        python3-venv zlib1g-dev && \
    rm -rf /var/lib/apt/lists/* && \
    python3 -m venv /opt/venv && \
    useradd --uid 10001 --create-home relaxmim && \
    chmod 1777 /home/relaxmim && \
    install -d -m 1777 /data
# HOME and USER: also for `docker run --user`, where the container has no such account.
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH HOME=/home/relaxmim USER=relaxmim \
    PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

COPY requirements.lock /opt/lock/all
WORKDIR /opt/lock
RUN grep -E '^torch(vision)?==' all >torch; grep '^deepspeed==' all >deepspeed; \
    grep -v '^deepspeed==' all >rest; \
    if [ "$VARIANT" = cpu ] && [ -n "$TORCH_INDEX" ]; then \
        grep -vE '^(deepspeed|torch|torchvision|triton)==|^(nvidia|cuda)-' all >rest; \
        pip install --no-deps --index-url "$TORCH_INDEX" -r torch; \
    fi; \
    pip install --no-deps -r rest

# DeepSpeed's fused ops, compiled now. Its CPU ops would take the build machine's instruction set.
# hadolint ignore=SC2016
RUN printf '#!/bin/bash\nset -- "${@/-march=native/-march=x86-64-v3}"\nexec g++ "${@/-D__AVX512__/-D__AVX256__}"\n' >/tmp/g++; \
    chmod +x /tmp/g++; \
    if [ "$VARIANT" = cpu ]; then export DS_BUILD_SHM_COMM=1; fi; \
    CC=/tmp/g++ CXX=/tmp/g++ DS_ACCELERATOR="$VARIANT" DS_BUILD_FUSED_ADAM=1 \
    TORCH_CUDA_ARCH_LIST="$CUDA_ARCHITECTURES" \
    pip install --no-deps --no-build-isolation --no-binary deepspeed -r deepspeed; \
    rm /tmp/g++

# Pillow-SIMD beside Pillow: Python takes it where the processor has AVX2, and Pillow elsewhere.
RUN CC="cc -mavx2" C_INCLUDE_PATH="/usr/include/$(cc -print-multiarch)" \
    pip install --no-deps --no-binary pillow-simd --target /opt/pillow-simd \
        pillow-simd==12.1.1.post0 && \
    PYTHONPATH=/opt/pillow-simd python -c 'from PIL import features as f; \
        assert all(map(f.check, ("jpg", "zlib", "webp", "libtiff")))' && \
    printf 'import sys; "avx2" in open("/proc/cpuinfo").read() and sys.path.insert(0, "/opt/pillow-simd")\n' \
        >"$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/pillow_simd.pth"

COPY . /opt/relaxmim
RUN pip install --no-deps --no-build-isolation -e /opt/relaxmim

LABEL org.opencontainers.image.title="relaxmim" \
      org.opencontainers.image.description="Masked-image-modelling pretraining: MAE, R-MAE, C-MAE" \
      org.opencontainers.image.licenses="Apache-2.0"
USER 10001
WORKDIR /data
ENTRYPOINT ["/opt/relaxmim/launch.sh"]
CMD ["--help"]
