# The relay as an image: no root, no compiler, no pip, nothing but what run.txt locks.
#
#   docker build --tag voucherify-relay .
#   docker run --init --stop-timeout 30 --publish 127.0.0.1:8000:8000 \
#     --env-file .env --volume relay-data:/var/lib/relay voucherify-relay
#
# A tag can move. For builds that repeat, pin the digest that `docker buildx imagetools
# inspect python:3.12-slim` shows: --build-arg BASE=python:3.12-slim@sha256:…
ARG BASE=python:3.12-slim

# ---- Everything that is only needed to build -----------------------------------------
FROM ${BASE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src

# In its own layer, so that a change of the code installs nothing anew. The machine's
# pip fills the environment from outside, and so leaves no pip in it. Wheels alone: a
# source archive would run its author's code here. Byte code that is not bound to file
# times stays valid however the layers are copied; without it every start takes seconds,
# for what runs is read-only.
COPY requirements/run.txt requirements/
RUN python -m venv --without-pip /opt/relay \
 && python -m pip --python /opt/relay/bin/python install --no-compile \
      --require-hashes --only-binary :all: -r requirements/run.txt \
 && python -m compileall -q --invalidation-mode unchecked-hash /opt/relay/lib

# The build backend comes from the lock too. This names what hatchling needs of it: if
# a name is missing, --require-hashes ends the build and tells which.
COPY requirements/dev.txt requirements/
RUN awk '/^[^ ]/ { wanted = /^(hatchling|packaging|pathspec|pluggy|tomlkit|trove-classifiers)==/ } wanted' \
      requirements/dev.txt > /tmp/build.txt \
 && python -m pip install --require-hashes --only-binary :all: -r /tmp/build.txt

COPY pyproject.toml README.md LICENSE ./
COPY relay relay
RUN python -m pip wheel --no-deps --no-build-isolation --no-index --wheel-dir /dist . \
 && python -m pip --python /opt/relay/bin/python install --no-compile --no-deps \
      --no-index /dist/*.whl \
 && python -m compileall -q --invalidation-mode unchecked-hash /opt/relay/lib

# ---- What runs -----------------------------------------------------------------------
FROM ${BASE}
LABEL org.opencontainers.image.title="voucherify-relay" \
      org.opencontainers.image.licenses="MIT"

# A number above what distributions give away, so that a volume's owner is no one else.
# Docker gives a new volume the owner and mode of the directory that it covers.
RUN python -m pip uninstall --yes --quiet --root-user-action ignore pip \
 && groupadd --system --gid 10001 relay \
 && useradd --system --uid 10001 --gid relay --no-create-home --home-dir /nonexistent \
      --shell /usr/sbin/nologin relay \
 && install --directory --owner relay --group relay --mode 0700 /var/lib/relay \
 && install --directory --owner relay --group relay --mode 0755 /run/relay

COPY --from=build /opt/relay /opt/relay

# The ops listener stays on the container's own loopback, where the check below and
# `docker exec` reach it.
ENV PATH=/opt/relay/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    RELAY_HOST=0.0.0.0 \
    RELAY_DATA_DIR=/var/lib/relay

# As numbers: Kubernetes' runAsNonRoot cannot judge a name.
USER 10001:10001
VOLUME /var/lib/relay
EXPOSE 8000
STOPSIGNAL SIGTERM

# Alive, not ready: a Redis that is away is not cured by a restart of the relay.
# http.client, because urllib would ask a proxy that the environment names.
HEALTHCHECK --interval=5s --timeout=3s --start-period=30s --retries=3 \
  CMD ["python", "-c", "import http.client, sys; check = http.client.HTTPConnection('127.0.0.1', 9000, timeout=2); check.request('GET', '/healthz'); sys.exit(check.getresponse().status != 200)"]

ENTRYPOINT ["relay"]
CMD ["serve"]
