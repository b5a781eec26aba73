# One image for every launcher.
#   docker build -t noprop-dist .                                                                   CUDA (torch brings its libraries)
#   docker build -t noprop-dist:cpu --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .  CPU only, a tenth of the size
#   docker build -t noprop-dist:ray --build-arg EXTRAS=[ray] .                                      for launch/kubernetes/rayjob.yaml
#   docker run --gpus all -e RANKS=2 -v "$PWD/runs:/work/runs" -v "$PWD/data:/data" noprop-dist configs/mnist/dt-one-hot.yaml
ARG BASE=debian:bookworm-slim

FROM ${BASE} AS build
ARG TORCH_INDEX=https://pypi.org/simple
ARG EXTRAS=
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends python3-venv \
    && python3 -m venv /opt/venv
WORKDIR /src
COPY constraints.txt pyproject.toml README.md ./
# == instead of ===: an index of its own has builds such as 2.13.0+cpu
RUN sed --in-place 's/===/==/' constraints.txt \
    && /opt/venv/bin/pip install --no-cache-dir --constraint constraints.txt --index-url "${TORCH_INDEX}" torch torchvision
COPY noprop_dist noprop_dist
RUN /opt/venv/bin/pip install --no-cache-dir --constraint constraints.txt ".${EXTRAS}"

FROM ${BASE}
# iproute2: launch/torchrun.sh on several nodes
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends iproute2 python3 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home noprop \
    && install --directory --owner noprop /work/runs /data
COPY --from=build /opt/venv /opt/venv
WORKDIR /work
COPY configs configs
COPY launch launch
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 NOPROP_DATA=/data \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000
ENTRYPOINT ["/work/launch/torchrun.sh"]
CMD ["configs/digits/dt.yaml"]
