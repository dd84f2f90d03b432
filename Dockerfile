# What `make env` sets up, by the same script and with its pins: a host of each task, mmcv's operators, kd_mm.
#
#   docker build -t kd_mm .                                the published hosts
#   docker build -t kd_mm --build-arg STACK=onedl .        the maintained forks
#   docker run --rm -it -v /path/to/data:/kd_mm/data kd_mm kd-mm doctor
#
# mmcv's operators are compiled for the processor alone, because the base image has no CUDA compiler. For a GPU:
#   --build-arg BASE=(an image with nvcc and Python 3.10 to 3.12) --build-arg FORCE_CUDA=1
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}

ARG STACK=upstream
ARG KD_MM_TORCH=torch==2.13.0
ARG FORCE_CUDA=0
ENV KD_MM_TORCH=${KD_MM_TORCH} FORCE_CUDA=${FORCE_CUDA} KD_MM_CACHE=/var/cache/kd_mm PIP_NO_CACHE_DIR=1

RUN apt-get update && apt-get install -y --no-install-recommends g++ git make && rm -rf /var/lib/apt/lists/*

WORKDIR /kd_mm
COPY . .
RUN python3 tools/dev/setup_env.py --stack ${STACK} --venv /opt/kd_mm && rm -rf /var/cache/kd_mm
ENV PATH=/opt/kd_mm/bin:${PATH}
CMD ["kd-mm", "--help"]
