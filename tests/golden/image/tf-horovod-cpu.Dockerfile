# tf-horovod-cpu: Keras 3 and Horovod over Open MPI, with parallel HDF5, for CPU nodes
# Rendered from the recipe; change that, not this.

# The base: bootstrapped from its packages beforehand.
FROM scratch AS base
ADD base.tar /

FROM base AS python

# Python packages, every file checked against its hash in the lock
RUN --mount=type=bind,from=build,target=/mnt \
    set -eu; \
    echo 'step: Python packages, every file checked against its hash in the lock'; \
    export DEBIAN_FRONTEND=noninteractive; \
    if [ -e /mnt/settings.sh ]; then . /mnt/settings.sh; fi; \
    python3 -m venv /opt/hpcutils-env; \
    /opt/hpcutils-env/bin/pip install --no-cache-dir --no-compile --no-deps --require-hashes --only-binary=:all: \
        --requirement /mnt/locks/packages.txt

# h5py 3.14.0 and horovod 0.28.1, compiled against the packages above
RUN --mount=type=bind,from=build,target=/mnt \
    set -eu; \
    echo 'step: h5py 3.14.0 and horovod 0.28.1, compiled against the packages above'; \
    export DEBIAN_FRONTEND=noninteractive; \
    if [ -e /mnt/settings.sh ]; then . /mnt/settings.sh; fi; \
    if [ -e /mnt/wheels/.complete ]; then \
        cp -r /mnt/wheels /opt/wheels; \
    else \
        apt-get update; \
        apt-get install --yes --no-install-recommends -o Dir::Etc::Preferences=/mnt/locks/apt cmake g++ \
            libfarmhash-dev libhdf5-openmpi-dev libhighwayhash-dev libopenmpi-dev make pkg-config python3-dev; \
        rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/*-old /var/cache/ldconfig/* /var/log/*; \
        /opt/hpcutils-env/bin/pip install --no-cache-dir --no-compile --no-deps --require-hashes --only-binary=:all: \
            --target /opt/tools --requirement /mnt/locks/tools.txt; \
        export PYTHONPATH=/opt/tools MAKEFLAGS=-j$(nproc); \
        env CC=mpicc HDF5_MPI=ON HDF5_DIR=/usr/lib/x86_64-linux-gnu/hdf5/openmpi /opt/hpcutils-env/bin/pip wheel \
            --no-cache-dir --no-deps --require-hashes --no-binary=:all: --no-build-isolation --wheel-dir=/opt/wheels \
            --requirement /mnt/locks/compile-h5py.txt & h5py_job=$!; \
        env CXXFLAGS=-std=c++17 HOROVOD_WITH_TENSORFLOW=1 HOROVOD_WITHOUT_PYTORCH=1 HOROVOD_WITHOUT_MXNET=1 \
            HOROVOD_WITH_MPI=1 HOROVOD_WITHOUT_GLOO=1 /opt/hpcutils-env/bin/pip wheel --no-cache-dir --no-deps \
            --require-hashes --no-binary=:all: --no-build-isolation --wheel-dir=/opt/wheels --requirement \
            /mnt/locks/compile-horovod.txt & horovod_job=$!; \
        failed=0; \
        wait $h5py_job || failed=1; \
        wait $horovod_job || failed=1; \
        [ $failed = 0 ]; \
        unset PYTHONPATH; \
        if [ -w /mnt ]; then cp -r /opt/wheels /mnt/ && touch /mnt/wheels/.complete; fi; \
    fi

# the compiled packages
RUN --mount=type=bind,from=build,target=/mnt \
    set -eu; \
    echo 'step: the compiled packages'; \
    export DEBIAN_FRONTEND=noninteractive; \
    if [ -e /mnt/settings.sh ]; then . /mnt/settings.sh; fi; \
    /opt/hpcutils-env/bin/pip install --no-cache-dir --no-compile --no-deps --no-index /opt/wheels/*.whl

# nothing is installed into a finished image; compiled files, and dates
RUN \
    set -eu; \
    echo 'step: nothing is installed into a finished image; compiled files, and dates'; \
    /opt/hpcutils-env/bin/pip uninstall --yes pip; \
    python3 -m compileall -q -f -j 0 --invalidation-mode unchecked-hash /opt/hpcutils-env/lib >/dev/null || true; \
    find /opt/hpcutils-env -xdev -newermt '2025-01-01 00:00:00 UTC' -exec touch -h -d '2025-01-01 00:00:00 UTC' {} +

FROM base AS image
COPY --from=python /opt/hpcutils-env /opt/hpcutils-env

# system packages, in the versions of the lock
RUN --mount=type=bind,from=build,target=/mnt \
    set -eu; \
    echo 'step: system packages, in the versions of the lock'; \
    export DEBIAN_FRONTEND=noninteractive; \
    if [ -e /mnt/settings.sh ]; then . /mnt/settings.sh; fi; \
    apt-get update; \
    apt-get install --yes --no-install-recommends -o Dir::Etc::Preferences=/mnt/locks/apt graphviz \
        libhdf5-openmpi-103-1 libhdf5-openmpi-hl-100 openmpi-bin; \
    rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/*-old /var/cache/ldconfig/* /var/log/*; \
    if command -v fc-cache; then mkdir -p /usr/share/fonts /usr/local/share/fonts; find /usr/share/fonts /usr/local/share/fonts -type d -exec touch -d '2025-01-01 00:00:00 UTC' {} +; fc-cache -sf; find /etc/fonts -xdev -newermt '2025-01-01 00:00:00 UTC' -exec touch -h -d '2025-01-01 00:00:00 UTC' {} +; fi; \
    find /usr /var -xdev -newermt '2025-01-01 00:00:00 UTC' -exec touch -h -d '2025-01-01 00:00:00 UTC' {} +

# where Python finds the packages, and hpcutils' own code, which comes last
RUN \
    set -eu; \
    echo 'step: where Python finds the packages, and hpcutils own code, which comes last'; \
    echo /hpcutils-src > /opt/hpcutils-env/lib/python3.11/site-packages/hpcutils.pth; \
    mkdir -p /usr/local/lib/python3.11/dist-packages; \
    echo 'import site; site.addsitedir("/opt/hpcutils-env/lib/python3.11/site-packages")' > /usr/local/lib/python3.11/dist-packages/hpcutils-env.pth; \
    ln -sf /hpcutils-src/bin/hpcutils /usr/local/bin/hpcutils

ENV PATH="/opt/hpcutils-env/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ENV LC_ALL="C.UTF-8"
ENV PYTHONNOUSERSITE="1"
ENV OMPI_MCA_btl_vader_single_copy_mechanism="none"
ENV PMIX_MCA_gds="hash"

LABEL hpcutils.recipe="tf-horovod-cpu"
LABEL hpcutils.variant="cpu"
LABEL org.opencontainers.image.title="tf-horovod-cpu"
LABEL org.opencontainers.image.description="Keras 3 and Horovod over Open MPI, with parallel HDF5, for CPU nodes"

COPY --from=code / /hpcutils-src/
RUN /opt/hpcutils-env/bin/python3 -m compileall -q --invalidation-mode unchecked-hash /hpcutils-src
