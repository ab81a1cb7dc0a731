# t5tune for NVIDIA GPUs; it also runs without one. torch's wheels bring CUDA's libraries.
#
#     docker build -t t5tune .
#     docker run --rm --gpus all t5tune doctor
FROM python:3.12-slim AS build
WORKDIR /src
COPY . .
RUN python -m venv /opt/t5tune \
    && /opt/t5tune/bin/pip install --no-cache-dir '.[serve]'

FROM python:3.12-slim
# torch compiles kernels for GPUs, and DeepSpeed its optimizer for offloading
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 t5tune \
    && mkdir /work /models /kernels \
    && chmod 1777 /work /models /kernels
COPY --from=build /opt/t5tune /opt/t5tune
ENV PATH=/opt/t5tune/bin:$PATH \
    HOME=/tmp \
    HF_HOME=/models \
    TORCHINDUCTOR_CACHE_DIR=/kernels/torch \
    TRITON_CACHE_DIR=/kernels/triton
USER 1000
WORKDIR /work
ENTRYPOINT ["t5tune"]
CMD ["--help"]
