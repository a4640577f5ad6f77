"""Rows of logits: log-probability and gradient of one token a row, each in one pass over the logits.

Axis letters: n rows, V columns: the vocabulary or a slice of it that begins at column `first`. See
segment_logprob.py for the equations and for who calls this.

forward_rows reads every logit once; backward_rows_ reads every logit once and writes its gradient over it. On
a GPU a pair of Triton kernels does it, elsewhere the same arithmetic in plain torch. Both compute in float32
whatever the dtype of the logits; float64 logits stay float64, in plain torch.
"""

from math import e, log2
from typing import NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: plain torch does everything
    triton = None

BLOCK, WARPS = 4096, 4  # a Triton program holds BLOCK logits at one time, 32 a thread
TORCH_BLOCK = 1 << 19  # logits the torch path works on at one time: small enough to stay in a CPU's cache

LOG2_E = log2(e)  # both paths take powers of 2: exp(u) costs a GPU four instructions and a CPU 3 x the time
LOWEST = torch.finfo(torch.float32).min  # where a running maximum starts: -inf would make inf - inf at -inf


class Stats(NamedTuple):
    """What is known of each row after some of its columns, each [n], float32 or float64. lse = xmax / tau +
    log total stays in these two parts: huge logits would round their sum away."""

    chosen: Tensor  # the target's logit, once its column was seen
    xmax: Tensor  # the largest logit
    total: Tensor  # the sum of exp((x - xmax) / tau)

    @classmethod
    def empty(cls, inv_tau: Tensor):
        return cls(torch.empty_like(inv_tau), torch.full_like(inv_tau, LOWEST), torch.zeros_like(inv_tau))

    def logp(self, inv_tau: Tensor) -> Tensor:
        return (self.chosen - self.xmax) * inv_tau - self.total.log()


if triton:  # one program a row
    TL_LOG2_E: tl.constexpr = tl.constexpr(LOG2_E)

    @triton.jit
    def forward_kernel(x, y, inv_tau, chosen, xmax, total, first, V, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)  # row * V passes 2^31
        x += row * V
        c = tl.load(inv_tau + row) * TL_LOG2_E
        LANES: tl.constexpr = BLOCK // 4
        lane = tl.arange(0, LANES)
        tile = tl.arange(0, 4)[:, None] * LANES + lane[None, :]
        # Every lane keeps its own running max m and sum s of 2^((x - m) c): the loop reduces over four logits
        # of one thread, never across threads. What the columns before have left goes to lane 0.
        m = tl.where(lane == 0, tl.load(xmax + row), -3.4028234663852886e38)
        s = tl.where(lane == 0, tl.load(total + row), 0.0)
        for start in range(0, V, BLOCK):
            v = tl.load(x + start + tile, mask=start + tile < V, other=float("-inf")).to(tl.float32)
            new = tl.maximum(m, tl.max(v, 0))
            s = tl.exp2((m - new) * c) * s + tl.sum(tl.exp2((v - new[None, :]) * c), 0)
            m = new
        top = tl.max(m, 0)
        tl.store(xmax + row, top)
        tl.store(total + row, tl.sum(tl.exp2((m - top) * c) * s, 0))
        col = tl.load(y + row) - first
        here = (col >= 0) & (col < V)
        tl.store(chosen + row, tl.load(x + col, mask=here, other=0.0).to(tl.float32), mask=here)

    @triton.jit
    def backward_kernel(
        x, src, y, inv_tau, xmax, logsum, g, first, V, MOVED: tl.constexpr, BLOCK: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        source = tl.load(src + row) if MOVED else row
        scale = tl.load(g + row) * tl.load(inv_tau + row)
        c = tl.load(inv_tau + row) * TL_LOG2_E
        top = tl.load(xmax + row)
        log_total = tl.load(logsum + row) * TL_LOG2_E
        chosen = tl.load(y + row).to(tl.int32) - first
        for start in range(0, V, BLOCK):
            col = start + tl.arange(0, BLOCK)
            v = tl.load(x + source * V + col, mask=col < V, other=0.0).to(tl.float32)
            p = tl.exp2((v - top) * c - log_total)
            G = tl.where(col == chosen, scale, 0.0) - scale * p
            tl.store(x + row * V + col, G.to(x.dtype.element_ty), mask=col < V)


def uses_triton(x: Tensor) -> bool:
    return triton is not None and x.is_cuda and x.dtype != torch.float64


def forward_rows(x: Tensor, y: Tensor, inv_tau: Tensor, stats: Stats, first: int = 0):
    """Adds the columns x[n, V], which begin at `first`, to stats; y[n] and inv_tau[n] = 1 / tau."""
    V = x.shape[1]
    if uses_triton(x):
        with torch.cuda.device_of(x):
            forward_kernel[(len(x),)](x, y, inv_tau, *stats, first, V, BLOCK=BLOCK, num_warps=WARPS)
        return
    split = (t.split(max(1, TORCH_BLOCK // V)) for t in (x, y - first, inv_tau * LOG2_E, *stats))
    for block, col, c, chosen, xmax, total in zip(*split, strict=True):  # views of a few rows
        block = block.to(inv_tau.dtype)
        top = torch.maximum(xmax, block.amax(dim=1))
        powers = (block - top[:, None]).mul_(c[:, None]).exp2_()
        total.mul_(((xmax - top) * c).exp2_()).add_(powers.sum(dim=1))
        xmax.copy_(top)
        here = ((col >= 0) & (col < V)).nonzero()[:, 0]
        chosen[here] = block[here, col[here]]


def backward_rows_(x: Tensor, src: Tensor | None, y, inv_tau, xmax, logsum, g, first: int = 0):
    """Writes G of row i over x[i] for i < n = len(g), reading the logits of row src[i] (None: row i).

    y, inv_tau, xmax, logsum and g, each [n], are in the order of the output rows. A source row at n or beyond
    is never written and one below n is its own output, so nothing is overwritten before it is read."""
    n, V = len(g), x.shape[1]
    if uses_triton(x):
        args = x, g if src is None else src, y, inv_tau, xmax, logsum, g, first, V
        with torch.cuda.device_of(x):
            backward_kernel[(n,)](*args, MOVED=src is not None, BLOCK=BLOCK, num_warps=WARPS)
        return
    per_row = y - first, inv_tau * LOG2_E, xmax, logsum * LOG2_E, -g * inv_tau, g if src is None else src
    split = (t.split(max(1, TORCH_BLOCK // V)) for t in (x[:n], *per_row))
    for block, col, c, top, log_total, scale, source in zip(*split, strict=True):
        # no copy where row and dtype are right: then the rest is in place
        z = (block if src is None else x[source]).to(inv_tau.dtype)
        z.sub_(top[:, None]).mul_(c[:, None]).sub_(log_total[:, None]).exp2_()
        here = ((col >= 0) & (col < V)).nonzero()[:, 0]
        z[here, col[here]] -= 1
        z.mul_(scale[:, None])
        if z.data_ptr() != block.data_ptr():
            block.copy_(z)
