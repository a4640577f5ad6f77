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

BLOCK = 4096  # logits a Triton program holds at one time: 8 warps, 16 a thread, no spills
TORCH_BLOCK = 1 << 18  # logits the torch path works on at one time: small enough to stay in a CPU's cache

# ---- rows of logits, in Triton: one program a row ----

if triton:

    @triton.jit
    def forward_kernel(
        x, y, inv_tau, logp, xmax, logsum, entropy, V, ENTROPY: tl.constexpr, BLOCK: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)  # row * V passes 2^31
        x += row * V
        c = tl.load(inv_tau + row)
        lane = tl.arange(0, BLOCK)
        # Every lane keeps its own running max m, s = sum exp(u) and w = sum u exp(u) with u = (x - m) / tau,
        # so the loop holds no reduction. m starts at the lowest finite number: no inf - inf at a -inf logit.
        m = tl.full([BLOCK], -3.4028234663852886e38, tl.float32)
        s = tl.full([BLOCK], 0.0, tl.float32)
        w = tl.full([BLOCK], 0.0, tl.float32)
        for start in range(0, V, BLOCK):
            v = tl.load(x + start + lane, mask=start + lane < V, other=float("-inf")).to(tl.float32)
            u = (v - m) * c
            a = tl.where(tl.abs(u) > 200.0, 200.0, tl.abs(u))  # exp(-200) is 0, and 0 * a stays 0
            t = tl.exp(-a)  # the one exp: it scales either the old sum or the new term
            if ENTROPY:
                w = tl.where(u > 0, t * (w - a * s), w - t * a)
            s = tl.where(u > 0, s * t + 1.0, s + t)
            m = tl.where(u > 0, v, m)
        top = tl.max(m, 0)
        u = tl.maximum((m - top) * c, -200.0)
        total = tl.sum(s * tl.exp(u), 0)
        log_total = tl.log(total)
        chosen = tl.load(x + tl.load(y + row)).to(tl.float32)
        tl.store(logp + row, (chosen - top) * c - log_total)
        tl.store(xmax + row, top)
        tl.store(logsum + row, log_total)
        if ENTROPY:
            tl.store(entropy + row, log_total - tl.sum((w + u * s) * tl.exp(u), 0) / total)

    @triton.jit
    def backward_kernel(x, src, y, inv_tau, xmax, logsum, g, V, MOVED: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        source = tl.load(src + row) if MOVED else row
        c = tl.load(inv_tau + row)
        scale = tl.load(g + row) * c
        chosen = tl.load(y + row)
        top = tl.load(xmax + row)
        log_total = tl.load(logsum + row)
        for start in range(0, V, BLOCK):
            col = start + tl.arange(0, BLOCK)
            v = tl.load(x + source * V + col, mask=col < V, other=0.0).to(tl.float32)
            p = tl.exp((v - top) * c - log_total)
            G = scale * (tl.where(col == chosen, 1.0, 0.0) - p)
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
            forward_kernel[(len(x),)](*args, ENTROPY=len(out) == 4, BLOCK=BLOCK, num_warps=8)


def backward_rows_(x: Tensor, src: Tensor | None, y, inv_tau, xmax, logsum, g):
    """Writes row i of G over x[i] for i < n = len(g), reading the logits of row src[i] (None: row i).

    y, inv_tau, xmax, logsum and g, each [n], are in the order of the output rows. A source row at n or beyond
    is never written and one below n is its own output, so nothing is overwritten before it is read.
    """
    if not uses_triton(x):
        return backward_rows_torch_(x, src, y, inv_tau, xmax, logsum, g)
    with torch.cuda.device_of(x):
        args = (x, g if src is None else src, y, inv_tau, xmax, logsum, g, x.shape[1])
        backward_kernel[(len(g),)](*args, MOVED=src is not None, BLOCK=BLOCK, num_warps=8)


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
