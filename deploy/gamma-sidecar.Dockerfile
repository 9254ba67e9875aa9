# syntax=docker/dockerfile:1
# The sidecar: API, console and metrics. No torch, no CUDA; answers plans and allocations, makes no checkpoints.
#
#   docker build -f deploy/gamma-sidecar.Dockerfile -t gamma-sidecar:0.1.0 \
#       --build-arg PYTHON_IMAGE=python:3.11-slim-bookworm@sha256:... .
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
WORKDIR /src
COPY deploy/requirements/sidecar.lock deploy/requirements/object-storage.lock deploy/requirements/
RUN python3 -m venv /opt/gamma
ENV PATH=/opt/gamma/bin:$PATH
RUN python3 -m pip install --no-cache-dir --no-deps \
        --requirement deploy/requirements/sidecar.lock --requirement deploy/requirements/object-storage.lock
COPY pyproject.toml README.md LICENSE ./
COPY allocator allocator
COPY gamma_vllm gamma_vllm
RUN python3 -m pip install --no-cache-dir --no-deps .

FROM ${PYTHON_IMAGE}
COPY --from=build /opt/gamma /opt/gamma
RUN groupadd --gid 10001 gamma && useradd --uid 10001 --gid gamma --create-home --home-dir /home/gamma gamma
USER 10001:10001
WORKDIR /home/gamma
ENV PATH=/opt/gamma/bin:$PATH \
    NVIDIA_DRIVER_CAPABILITIES=utility
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s \
    CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8080/healthz', timeout=4)"]
ENTRYPOINT ["gamma"]
CMD ["sidecar", "--help"]
