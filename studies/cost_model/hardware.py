"""GPUs and their links from data sheets: bytes and FLOPs a second, each way."""

from dataclasses import dataclass

from training.runtime import PEAK_FLOPS


@dataclass(frozen=True)
class GPU:
    """flops: dense bf16 a second. memory: bytes. hbm: bytes a second to and from it."""

    flops: float
    memory: float
    hbm: float


# NVIDIA's data sheets of the H100 and the H200 Tensor Core GPU, SXM.
GPUS = {
    "H100": GPU(PEAK_FLOPS["NVIDIA H100 80GB HBM3"], 80e9, 3.35e12),
    "H200": GPU(PEAK_FLOPS["NVIDIA H200"], 141e9, 4.8e12),
}
NODE = 8  # GPUs (NVIDIA DGX H100 data sheet)
# A GPU to those of its node, one way: half of the 900 GB/s of the H100 data sheet, which counts
# both ways.
NVLINK = 450e9
# A GPU to other nodes, one way: one 400 Gb/s ConnectX-7 port for each of the 8 (DGX H100 data
# sheet).
NETWORK = 50e9


def ring_speed(ranks: int) -> float:
    """Return bytes a second and GPU of a ring through neighbours.

    A byte enters a node once, and the 8 ports share the work, as in NCCL's rings.
    """
    return NVLINK if ranks <= NODE else min(NVLINK, NODE * NETWORK)


def direct_speed(ranks: int) -> float:
    """Return bytes a second and GPU of an all-to-all.

    Its bytes have one receiver each, and those to other nodes pass the port of their own GPU.
    """
    return NVLINK if ranks <= NODE else NETWORK * (ranks - 1) / (ranks - NODE)
