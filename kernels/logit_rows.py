"""Rows of logits: log-probability, entropy and gradient of one token a row, each in one pass over the logits.

Axis letters: n rows, V vocabulary. See segment_logprob.py for the equations and for who calls this.

forward_rows reads every logit once; backward_rows_ reads every logit once and writes its gradient over it. On
a GPU a pair of Triton kernels does it, elsewhere the same arithmetic in plain torch. Both compute in float32
whatever the dtype of the logits; float64 logits stay float64, in plain torch.
"""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: plain torch does everything
    triton = None

BLOCK, WARPS = 4096, 4  # a Triton program holds BLOCK logits at one time, 32 a thread
TORCH_BLOCK = 1 << 18  # logits the torch path works on at one time: small enough to stay in a CPU's cache

# ---- rows of logits, in Triton: one program a row ----

if triton:
    LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)  # exp(u) costs four instructions, exp2 one

    @triton.jit
    def forward_kernel(
        x, y, inv_tau, logp, xmax, logsum, entropy, V, ENTROPY: tl.constexpr, BLOCK: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)  # row * V passes 2^31
        x += row * V
        c = tl.load(inv_tau + row) * LOG2_E
        LANES: tl.constexpr = BLOCK // 4
        tile = tl.arange(0, 4)[:, None] * LANES + tl.arange(0, LANES)[None, :]
        # Every lane keeps its own running max m and, of u = (x - m) c, the sums s of 2^u and w of u 2^u: the
        # loop reduces over four logits of one thread, never across threads. m starts at the lowest finite
        # number and u ends at -200, where 2^u is 0: no inf - inf and no 0 * inf at a logit of -inf.
        m = tl.full([LANES], -3.4028234663852886e38, tl.float32)
        s = tl.full([LANES], 0.0, tl.float32)
        w = tl.full([LANES], 0.0, tl.float32)
        for start in range(0, V, BLOCK):
            v = tl.load(x + start + tile, mask=start + tile < V, other=float("-inf")).to(tl.float32)
            new = tl.maximum(m, tl.max(v, 0))
            shift = tl.maximum((m - new) * c, -200.0)
            old = tl.exp2(shift)
            u = (v - new[None, :]) * c
            t = tl.exp2(u)
            if ENTROPY:
                w = old * (w + shift * s) + tl.sum(t * tl.maximum(u, -200.0), 0)
            s = old * s + tl.sum(t, 0)
            m = new
        top = tl.max(m, 0)
        shift = tl.maximum((m - top) * c, -200.0)
        old = tl.exp2(shift)
        total = tl.sum(old * s, 0)
        log_total = tl.log(total)
        chosen = tl.load(x + tl.load(y + row)).to(tl.float32)
        tl.store(logp + row, (chosen - top) * tl.load(inv_tau + row) - log_total)
        tl.store(xmax + row, top)
        tl.store(logsum + row, log_total)
        if ENTROPY:
            tl.store(entropy + row, log_total - tl.sum(old * (w + shift * s), 0) / (total * LOG2_E))

    @triton.jit
    def backward_kernel(x, src, y, inv_tau, xmax, logsum, g, V, MOVED: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        source = tl.load(src + row) if MOVED else row
        scale = tl.load(g + row) * tl.load(inv_tau + row)
        c = tl.load(inv_tau + row) * LOG2_E
        top = tl.load(xmax + row)
        log_total = tl.load(logsum + row) * LOG2_E
        chosen = tl.load(y + row).to(tl.int32)
        for start in range(0, V, BLOCK):
            col = start + tl.arange(0, BLOCK)
            v = tl.load(x + source * V + col, mask=col < V, other=0.0).to(tl.float32)
            p = tl.exp2((v - top) * c - log_total)
            G = tl.where(col == chosen, scale, 0.0) - scale * p
            tl.store(x + row * V + col, G.to(x.dtype.element_ty), mask=col < V)


def forward_rows(x: Tensor, y: Tensor, inv_tau: Tensor, out: list[Tensor]):
    """x[n, V], y[n], inv_tau[n] -> out: logp, xmax, logsum and, if asked for, entropy, each [n].

    lse is kept in two parts, xmax / tau and logsum: huge logits would round their sum away.
    """
    if not uses_triton(x):
        return forward_rows_torch(x, y, inv_tau, out)
    if len(x):
        with torch.cuda.device_of(x):
            args = (x, y, inv_tau, *out[:3], out[-1], x.shape[1])
            forward_kernel[(len(x),)](*args, ENTROPY=len(out) == 4, BLOCK=BLOCK, num_warps=WARPS)


def backward_rows_(x: Tensor, src: Tensor | None, y, inv_tau, xmax, logsum, g):
    """Writes row i of G over x[i] for i < n = len(g), reading the logits of row src[i] (None: row i).

    y, inv_tau, xmax, logsum and g, each [n], are in the order of the output rows. A source row at n or beyond
    is never written and one below n is its own output, so nothing is overwritten before it is read.
    """
    if not uses_triton(x):
        return backward_rows_torch_(x, src, y, inv_tau, xmax, logsum, g)
    with torch.cuda.device_of(x):
        args = (x, g if src is None else src, y, inv_tau, xmax, logsum, g, x.shape[1])
        backward_kernel[(len(g),)](*args, MOVED=src is not None, BLOCK=BLOCK, num_warps=WARPS)


def uses_triton(x: Tensor) -> bool:
    return triton is not None and x.is_cuda and x.dtype != torch.float64


# ---- the same in plain torch: the reference ----


def forward_rows_torch(x, y, inv_tau, out):
    step = max(1, TORCH_BLOCK // x.shape[1])
    for a in range(0, len(x), step):
        rows = slice(a, a + step)
        block = x[rows].to(inv_tau.dtype)
        top = block.amax(dim=1, keepdim=True)
        z = (block - top).mul_(inv_tau[rows, None])  # [step, V], at most 0
        chosen = z.gather(1, y[rows, None])
        e = z.exp() if len(out) == 4 else z.exp_()
        total = e.sum(dim=1, keepdim=True)
        log_total = total.log()
        parts = [chosen - log_total, top, log_total]
        if len(out) == 4:  # H = logsum - sum p z, to which a -inf logit adds 0
            parts.append(log_total - e.mul_(z.clamp_(min=-1e4)).sum(dim=1, keepdim=True) / total)
        for o, part in zip(out, parts, strict=True):
            o[rows] = part[:, 0]


def backward_rows_torch_(x, src, y, inv_tau, xmax, logsum, g):
    n, step = len(g), max(1, TORCH_BLOCK // x.shape[1])
    scale = g * inv_tau
    for a in range(0, n, step):
        rows = slice(a, min(a + step, n))
        block = x[rows] if src is None else x[src[rows]]
        z = block.to(inv_tau.dtype)  # no copy where the dtype is right: then the rest is in place
        z.sub_(xmax[rows, None]).mul_(inv_tau[rows, None]).sub_(logsum[rows, None]).exp_()
        z.scatter_add_(1, y[rows, None], z.new_full((len(z), 1), -1.0)).mul_(-scale[rows, None])
        if z.data_ptr() != x[rows].data_ptr():
            x[rows] = z
