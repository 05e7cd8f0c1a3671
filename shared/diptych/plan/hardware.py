"""Accelerators by name: published peak figures, and what a chip costs for an hour.

Sources: cloud.google.com/tpu/docs (v5e, v5p and v6e pages: peak compute, memory, bandwidth of the inter-chip
interconnect) and NVIDIA's data sheets (A100 80 GB SXM, H100 SXM, H200 SXM; dense, without sparsity). Usable memory of a
TPU is what its compiler says it may fill. Prices are on-demand list prices as published in 2025, in US dollars; they
change, and `--price` takes the place of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from diptych.errors import UserError

GiB = 2**30


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One chip.

    flops: bfloat16 multiply-adds of matrix products, two FLOPs each, per second. float32_share: of that rate in
    float32 at full precision. memory: usable bytes. hbm: bytes per second. link: bytes per second, one way, of one link
    to a neighbour. wraps: a torus axis has its wrap-around link where its length is a multiple of this (0: never).
    hop: seconds that a message takes for a hop. fabric: bytes per second and chip between nodes (GPUs; 0: the links
    reach everywhere). price: dollars per chip and hour.
    """

    name: str
    title: str
    kind: Literal["tpu", "gpu", "cpu"]
    flops: float
    float32_share: float
    memory: float
    hbm: float
    link: float
    wraps: int = 0
    hop: float = 1e-6
    fabric: float = 0.0
    price: float = 0.0
    price_source: str = ""

    def peak(self, precision: str) -> float:
        """FLOP/s of matrix products in this precision."""
        return self.flops * (1.0 if precision == "bfloat16" else self.float32_share)


GOOGLE = "Google Cloud list price, on demand, US regions, 2025"
RENTED = "typical on-demand price of GPU clouds, 2025"
# float32 at full precision is six passes of bfloat16 on a TPU; on a GPU it runs outside the tensor cores.
ACCELERATORS: Mapping[str, Accelerator] = {
    one.name: one
    for one in (
        Accelerator(
            name="v5e", title="TPU v5e", kind="tpu", flops=197e12, float32_share=1 / 6, memory=15.75 * GiB, hbm=819e9,
            link=50e9, wraps=16, price=1.20, price_source=GOOGLE,
        ),
        Accelerator(
            name="v5p", title="TPU v5p", kind="tpu", flops=459e12, float32_share=1 / 6, memory=95.74 * GiB, hbm=2765e9,
            link=100e9, wraps=4, price=4.20, price_source=GOOGLE,
        ),
        Accelerator(
            name="v6e", title="TPU v6e (Trillium)", kind="tpu", flops=918e12, float32_share=1 / 6, memory=31.25 * GiB,
            hbm=1640e9, link=100e9, wraps=16, price=2.70, price_source=GOOGLE,
        ),
        Accelerator(
            name="a100", title="A100 80 GB SXM", kind="gpu", flops=312e12, float32_share=19.5 / 312, memory=79 * GiB,
            hbm=2039e9, link=300e9, fabric=25e9, price=1.80, price_source=RENTED,
        ),
        Accelerator(
            name="h100", title="H100 80 GB SXM", kind="gpu", flops=989e12, float32_share=67 / 989, memory=79 * GiB,
            hbm=3350e9, link=450e9, fabric=50e9, price=3.00, price_source=RENTED,
        ),
        Accelerator(
            name="h200", title="H200 141 GB SXM", kind="gpu", flops=989e12, float32_share=67 / 989, memory=139 * GiB,
            hbm=4800e9, link=450e9, fabric=50e9, price=3.80, price_source=RENTED,
        ),
        Accelerator(
            name="cpu", title="virtual CPU device (nominal figures, not this machine's)", kind="cpu", flops=50e9,
            float32_share=1.0, memory=16 * GiB, hbm=10e9, link=5e9, price=0.0, price_source="no price",
        ),
    )
}  # fmt: skip
GPUS_PER_NODE = 8


def read_gpu(name: str) -> Accelerator:
    """`a100`, `h100`, `h200`. UserError for anything else."""
    gpus = [one.name for one in ACCELERATORS.values() if one.kind == "gpu"]
    if name not in gpus:
        raise UserError(f"--gpu {name}: choose one of {', '.join(gpus)}")
    return ACCELERATORS[name]


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Chips in a grid. name: as the compiler knows it (`v5e:16x16`)."""

    name: str
    chip: Accelerator
    sizes: tuple[int, ...]

    @property
    def num_chips(self) -> int:
        return math.prod(self.sizes)

    def is_ring(self, axis: int) -> bool:
        """Has this axis of the grid its wrap-around link?"""
        wraps = self.chip.wraps
        if self.chip.name == "v5p":  # only whole cubes of 4 x 4 x 4 chips are wired to a torus
            return all(size % wraps == 0 for size in self.sizes)
        return wraps > 0 and self.sizes[axis] % wraps == 0


def read_topology(text: str) -> Topology:
    """`v5e:16x16`, `v5p:2x2x4`, `v6e:8x8`, `cpu:8`. UserError for anything else."""
    name, _, grid = text.partition(":")
    known = [chip.name for chip in ACCELERATORS.values() if chip.kind != "gpu"]
    sizes = grid.split("x")
    if name not in known or not all(size.isdigit() and int(size) > 0 for size in sizes):
        raise UserError(
            f"--topology {text}: expected CHIP:GRID with one of {', '.join(known)}, like v5e:16x16, v5p:2x2x4 or cpu:8"
        )
    dims = 3 if name == "v5p" else 1 if name == "cpu" else 2
    if len(sizes) != dims:
        raise UserError(f"--topology {text}: a {name} grid has {dims} number{'s' * (dims > 1)}")
    return Topology(name=text, chip=ACCELERATORS[name], sizes=tuple(int(size) for size in sizes))
