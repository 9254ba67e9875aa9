# syntax=docker/dockerfile:1
# vLLM for CPUs (x86-64, AVX2 or newer) with the GAMMA plugin: serves, prepares and learns small models.
#
#   docker build -f deploy/gamma-vllm-cpu.Dockerfile -t gamma-vllm-cpu:0.1.0 \
#       --build-arg PYTHON_IMAGE=python:3.11-slim-bookworm@sha256:... .
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /src
COPY deploy/requirements/cpu.lock deploy/requirements/object-storage.lock deploy/requirements/
COPY deploy/alias_vllm.py deploy/alias_vllm.py
RUN python3 -m venv /opt/gamma
ENV PATH=/opt/gamma/bin:$PATH
# The locks are complete, so nothing is resolved; the extra index is asked for torch alone.
RUN python3 -m pip install --no-cache-dir --no-compile --no-deps --extra-index-url "$TORCH_INDEX" \
        "$(grep '^torch==' deploy/requirements/cpu.lock)"
RUN python3 -m pip install --no-cache-dir --no-compile --no-deps \
        --requirement deploy/requirements/cpu.lock --requirement deploy/requirements/object-storage.lock \
    && python3 deploy/alias_vllm.py
COPY pyproject.toml README.md LICENSE ./
COPY allocator allocator
COPY gamma_vllm gamma_vllm
RUN python3 -m pip install --no-cache-dir --no-deps .

FROM ${PYTHON_IMAGE}
# torch.compile calls a C++ compiler when the server starts.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/gamma /opt/gamma
RUN groupadd --gid 10001 gamma && useradd --uid 10001 --gid gamma --create-home --home-dir /home/gamma gamma
USER 10001:10001
WORKDIR /home/gamma
ENV PATH=/opt/gamma/bin:$PATH \
    OMP_WAIT_POLICY=PASSIVE \
    VLLM_NO_USAGE_STATS=1
EXPOSE 8000 8080
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m \
    CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["vllm"]
CMD ["serve", "--help"]
