# small-on-archive: one compiled package and a file
# Rendered from the recipe; change that, not this.

# buildah and podman read an archive; Docker has to load it first.
FROM oci-archive:base.tar AS base

FROM base AS python

# what the base lacks, in the versions of the lock
RUN --mount=type=bind,from=build,target=/mnt \
    set -eu; \
    echo 'step: what the base lacks, in the versions of the lock'; \
    export DEBIAN_FRONTEND=noninteractive; \
    if [ -e /mnt/settings.sh ]; then . /mnt/settings.sh; fi; \
    apt-get update; \
    apt-get install --yes --no-install-recommends -o Dir::Etc::Preferences=/mnt/locks/apt python3; \
    rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/*-old /var/cache/ldconfig/* /var/log/*

# Python packages, every file checked against its hash in the lock
RUN --mount=type=bind,from=build,target=/mnt \
    set -eu; \
    echo 'step: Python packages, every file checked against its hash in the lock'; \
    export DEBIAN_FRONTEND=noninteractive; \
    if [ -e /mnt/settings.sh ]; then . /mnt/settings.sh; fi; \
    python3 -m venv /opt/hpcutils-env; \
    /opt/hpcutils-env/bin/pip install --no-cache-dir --no-compile --no-deps --require-hashes --only-binary=:all: \
        --requirement /mnt/locks/packages.txt

# some-thing 1.0, compiled against the packages above
RUN --mount=type=bind,from=build,target=/mnt \
    set -eu; \
    echo 'step: some-thing 1.0, compiled against the packages above'; \
    export DEBIAN_FRONTEND=noninteractive; \
    if [ -e /mnt/settings.sh ]; then . /mnt/settings.sh; fi; \
    if [ -e /mnt/wheels/.complete ]; then \
        cp -r /mnt/wheels /opt/wheels; \
    else \
        /opt/hpcutils-env/bin/pip install --no-cache-dir --no-compile --no-deps --require-hashes --only-binary=:all: \
            --target /opt/tools --requirement /mnt/locks/tools.txt; \
        export PYTHONPATH=/opt/tools MAKEFLAGS=-j$(nproc); \
        env FLAGS='-O2 -DNAME='"'"'x'"'"'' /opt/hpcutils-env/bin/pip wheel --no-cache-dir --no-deps --require-hashes \
            --no-binary=:all: --no-build-isolation --wheel-dir=/opt/wheels --requirement \
            /mnt/locks/compile-some-thing.txt & some_thing_job=$!; \
        failed=0; \
        wait $some_thing_job || failed=1; \
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
COPY files/0-motd /etc/motd

# what the base lacks, in the versions of the lock
RUN --mount=type=bind,from=build,target=/mnt \
    set -eu; \
    echo 'step: what the base lacks, in the versions of the lock'; \
    export DEBIAN_FRONTEND=noninteractive; \
    if [ -e /mnt/settings.sh ]; then . /mnt/settings.sh; fi; \
    apt-get update; \
    apt-get install --yes --no-install-recommends -o Dir::Etc::Preferences=/mnt/locks/apt python3; \
    rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/*-old /var/cache/ldconfig/* /var/log/*

# modes of copied files
RUN \
    set -eu; \
    echo 'step: modes of copied files'; \
    chmod 0600 /etc/motd

# where Python finds the packages, and hpcutils' own code, which comes last
RUN \
    set -eu; \
    echo 'step: where Python finds the packages, and hpcutils own code, which comes last'; \
    echo /hpcutils-src > /opt/hpcutils-env/lib/python3.11/site-packages/hpcutils.pth; \
    mkdir -p /usr/local/lib/python3.11/dist-packages; \
    echo 'import site; site.addsitedir("/opt/hpcutils-env/lib/python3.11/site-packages")' > /usr/local/lib/python3.11/dist-packages/hpcutils-env.pth; \
    ln -sf /hpcutils-src/bin/hpcutils /usr/local/bin/hpcutils

ENV PATH="/opt/hpcutils-env/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ENV GREETING="it's \"\$HOME\" \\ `id`"

LABEL hpcutils.recipe="small-on-archive"
LABEL hpcutils.variant="cpu"
LABEL org.opencontainers.image.title="small-on-archive"
LABEL org.opencontainers.image.description="one compiled package and a file"

COPY --from=code / /hpcutils-src/
RUN /opt/hpcutils-env/bin/python3 -m compileall -q --invalidation-mode unchecked-hash /hpcutils-src
