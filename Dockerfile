# syntax=docker/dockerfile:1
# Two images of one tree: `api` has no torch and also runs migrate and sweep; `worker` has it. Both run as a user
# without rights, with the versions of constraints.txt.

ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /source
RUN python -m venv /opt/bitwright
ENV PATH=/opt/bitwright/bin:$PATH
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY bitwright/pyproject.toml bitwright/pyproject.toml

# The libraries first: they change less often than the code. What setuptools built of the empty packages goes: it is newer
# than the files that are copied then, and would stay in their place.
FROM build AS build-api
RUN --mount=type=cache,target=/root/.cache/pip \
    mkdir -p app bitwright/asynchronous bitwright/blocking bitwright/cli bitwright/files bitwright/measured bitwright/webhooks \
    && touch app/__init__.py bitwright/__init__.py \
    && pip install -c constraints.txt ./bitwright '.[api,otel]' && pip uninstall -y bitwright bitwright-service \
    && rm -rf build bitwright/build
COPY bitwright bitwright
COPY app app
COPY workers workers
COPY migrations migrations
RUN --mount=type=cache,target=/root/.cache/pip pip install -c constraints.txt ./bitwright '.[api,otel]'

FROM build AS build-worker
RUN --mount=type=cache,target=/root/.cache/pip \
    mkdir -p app bitwright/asynchronous bitwright/blocking bitwright/cli bitwright/files bitwright/measured bitwright/webhooks \
    && touch app/__init__.py bitwright/__init__.py \
    && pip install -c constraints.txt ./bitwright '.[worker,otel]' && pip uninstall -y bitwright bitwright-service \
    && rm -rf build bitwright/build
COPY bitwright bitwright
COPY app app
COPY workers workers
COPY migrations migrations
RUN --mount=type=cache,target=/root/.cache/pip pip install -c constraints.txt ./bitwright '.[worker,otel]'

FROM python:${PYTHON}-slim AS runtime
RUN useradd --system --uid 10001 --create-home bitwright \
    && install -d -o bitwright -g bitwright /var/lib/bitwright /var/lib/bitwright-workspaces
ENV PATH=/opt/bitwright/bin:$PATH PYTHONUNBUFFERED=1 \
    BITWRIGHT_DATA_DIR=/var/lib/bitwright BITWRIGHT_LOG_FORMAT=json BITWRIGHT_ENVIRONMENT=production
WORKDIR /var/lib/bitwright
VOLUME /var/lib/bitwright
STOPSIGNAL SIGTERM

FROM runtime AS api
COPY --from=build-api /opt/bitwright /opt/bitwright
# A container is reached by its own address.
ENV BITWRIGHT_HOST=0.0.0.0
# bitwright, by its number: what runs containers cannot look names up.
USER 10001
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/readyz', timeout=4)"]
CMD ["bitwright", "api"]

FROM runtime AS worker
# Triton compiles at run time: it needs a C compiler and the C library's headers (Python's own are in this image).
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/* \
    && install -d -o bitwright -g bitwright /var/cache/bitwright
COPY --from=build-worker /opt/bitwright /opt/bitwright
# What a container runtime with NVIDIA's toolkit looks for; without a GPU they change nothing.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
# Kernels are kept here and loaded from here: writable, and not on a disk mounted with noexec, as Docker's tmpfs is.
ENV TRITON_CACHE_DIR=/var/cache/bitwright/triton
VOLUME /var/cache/bitwright
# bitwright, by its number: what runs containers cannot look names up.
USER 10001
CMD ["bitwright", "worker"]
