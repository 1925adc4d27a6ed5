# The training program under torchrun. No text and no runs are in the image: mount them (docs/cluster.md).
#   docker build -t nanodual .                                                                       torch from PyPI
#   docker build -t nanodual --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .          without CUDA; …/whl/cuNNN for a certain one
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

# The owner of a bind mount is the host's: docker run --user "$(id -u):$(id -g)" where that is another one.
RUN useradd --create-home --uid 1000 nanodual && mkdir corpora runs && chown nanodual corpora runs
USER nanodual
ENV HOME=/home/nanodual MPLCONFIGDIR=/tmp

ENTRYPOINT ["torchrun"]
CMD ["--help"]
