# The service of Palate: `docker build -t palate .`, then see docs/deploying.md. Base images are pinned by tag; pin them by digest
# (`docker buildx imagetools inspect`) where a rebuild has to be the same to the byte.
ARG PYTHON=python:3.11.14-slim-bookworm

FROM ${PYTHON} AS build
# Which packages are installed is in constraints.txt. An index that has the CPU builds of torch makes the image several gigabytes
# smaller: --build-arg TORCH_INDEX=... (the install page of PyTorch names theirs). An index of your own: --build-arg PIP_INDEX_URL=...
ARG TORCH_INDEX=""
ARG PIP_INDEX_URL
ARG EXTRAS=serve,postgres,style
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/palate
WORKDIR /build
COPY constraints.txt ./
RUN /opt/palate/bin/pip install --constraint constraints.txt ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} torch
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN /opt/palate/bin/pip install --constraint constraints.txt ".[${EXTRAS}]"

FROM ${PYTHON}
# One thread for each product: many small ones at once are quicker than a few that share the cores.
ENV PATH=/opt/palate/bin:${PATH} PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 \
    HF_HUB_OFFLINE=1 PALATE_CACHE=/tmp/palate-cache
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin palate \
    && install -d -o 10001 -g 10001 -m 0700 /data
COPY --from=build /opt/palate /opt/palate
USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["palate"]
# Beyond loopback it starts only where the store has keys: `palate keys add`.
CMD ["serve", "/model", "--store", "/data/profiles.db", "--host", "0.0.0.0"]
