# The image of every node of jobs/rayjob.yaml: CUDA 13.0 as torch 2.13 is built for, Ray, vLLM and otpo.
#
#     docker build --tag REGISTRY/otpo:0.1.0 .
#
# The hosts need an NVIDIA driver of branch 580 or newer. `devel`, because vLLM and Triton compile kernels when a model
# is loaded.
FROM nvidia/cuda:13.0.3-devel-ubuntu24.04

# wget: for KubeRay's probes. The compiler and Python's headers: for Triton.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential ca-certificates python3-dev python3-venv wget \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv

ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1

WORKDIR /opt/otpo
COPY . .
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --disable-pip-version-check --constraint constraints-gpu.txt '.[gpu]'

# Ubuntu's own user, number 1000: jobs/rayjob.yaml gives the volumes to its group. No ENTRYPOINT: KubeRay brings the
# command of each container.
USER 1000
WORKDIR /home/ubuntu
RUN otpo doctor
