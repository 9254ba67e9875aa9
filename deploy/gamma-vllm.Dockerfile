# syntax=docker/dockerfile:1
# vLLM for NVIDIA GPUs with the GAMMA plugin: serves, prepares and learns.
#
#   docker build -f deploy/gamma-vllm.Dockerfile -t gamma-vllm:0.1.0 \
#       --build-arg VLLM_IMAGE=vllm/vllm-openai:v0.33.0@sha256:... .
#
# Name both images by digest for a build that can be repeated (docker buildx imagetools inspect IMAGE shows it).
ARG VLLM_IMAGE=vllm/vllm-openai:v0.33.0
ARG PYTHON_IMAGE=python:3.12-slim-bookworm

FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY allocator allocator
COPY gamma_vllm gamma_vllm
RUN python3 -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM ${VLLM_IMAGE}
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# What vLLM's image has stays at its version.
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    --mount=type=bind,source=deploy/requirements/object-storage.lock,target=/locks/object-storage.lock \
    python3 -m pip freeze | grep -E '^[A-Za-z0-9._-]+==' > /tmp/constraints.txt \
    && python3 -m pip install --no-cache-dir --constraint /tmp/constraints.txt --find-links /wheels "gamma-vllm[learn,share,sidecar]" \
    && python3 -m pip install --no-cache-dir --no-deps --requirement /locks/object-storage.lock \
    && rm /tmp/constraints.txt
RUN groupadd --gid 10001 gamma && useradd --uid 10001 --gid gamma --create-home --home-dir /home/gamma gamma
USER 10001:10001
WORKDIR /home/gamma
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    VLLM_NO_USAGE_STATS=1
EXPOSE 8000 8080
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m \
    CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["vllm"]
CMD ["serve", "--help"]
