# The training program under torchrun. No text and no runs are in the image: mount them
# (docs/cluster.md). With torch from PyPI:
#   docker build -t nanodual .
# Without CUDA, or with …/whl/cuNNN for a certain CUDA:
#   docker build -t nanodual --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .
FROM python:3.11.15-slim-bookworm

WORKDIR /nanodual
COPY requirements.txt ./
# torch first and alone, so that nothing else can choose its build: as the Makefile does.
ARG TORCH_INDEX=https://pypi.org/simple
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" "$(grep '^torch==' requirements.txt)"
RUN pip install --no-cache-dir -r requirements.txt

COPY *.py LICENSE ./
COPY models ./models
COPY optim ./optim
COPY data ./data
COPY training ./training
COPY configs ./configs

# A bind mount keeps its owner on the host. If that is another user:
# docker run --user "$(id -u):$(id -g)"
RUN useradd --create-home --uid 1000 nanodual && mkdir corpora runs && chown nanodual corpora runs
USER nanodual
ENV HOME=/home/nanodual MPLCONFIGDIR=/tmp

ENTRYPOINT ["torchrun"]
CMD ["--help"]
