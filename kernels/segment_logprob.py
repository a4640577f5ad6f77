"""Log-probabilities of chosen tokens under a language-model head: both losses of ECHO from one forward pass.

Axis letters: B batch, T time, N rows that carry a loss, V vocabulary, d hidden size.

A row is one hidden state h[d] that scores one token y. With x = W h its V logits and tau its temperature,

    z = x / tau,    lse = log sum_v exp(z_v),    logp = z_y - lse,    p = softmax(z)

and since d lse / dz = p, any upstream gradient g = dL/dlogp of that row gives

    dL/dx = G = g (onehot(y) - p) / tau,      dL/dh = G W,      dL/dW = sum over rows of G^T h.

So the head needs nothing of the loss but one number a row: clipped policy gradient on some rows and
cross-entropy on others are plain torch over two slices of logp. The work is three GEMMs over N x V (x, dh and
dW, left to the vendor's library), one read of the logits in forward, one read and write in backward.

Memory: logits that fit in `logit_bytes` are kept from forward to backward, where G is written over them.
Beyond it they are computed in slices of the vocabulary, and once more in backward: a fourth GEMM for a
bounded buffer. A slice owns its rows of dW; only dh[N, d] adds up over slices, in float32. Prompt and padding
never reach the head; rows with g = 0 (clipped tokens, groups of equal reward) skip dh and dW. What happens to
the logits themselves is in logit_rows.py: two Triton kernels and their twin in plain torch.
"""

from math import ceil

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kernels.logit_rows import Stats, backward_rows_, forward_rows

LOGIT_BYTES = 3 << 30  # keeps the logits of 10,600 rows at V = 151,936 in bf16


def nonzero_first(g: Tensor) -> Tensor | None:
    """g[N] -> src[n]: the n rows with g != 0, each in its own place if that is below n; None if n = N. A row
    at n or beyond takes the place of a zero row below n. So sources beyond n are never written, and kept
    logits can be compacted in place by programs that run in any order."""
    active = g != 0
    n = int(active.sum())
    if n == len(g):
        return None
    src = torch.arange(n, device=g.device)
    src[~active[:n]] = n + active[n:].nonzero()[:, 0]
    return src


def slices(V: int, width: int):
    return [slice(a, min(a + width, V)) for a in range(0, V, width)]


def add_product_(acc: Tensor, G: Tensor, W: Tensor):
    """acc[n, d] += G[n, v] W[v, d]; acc is float32 where slices of bf16 add up: bf16 loses the small."""
    if G.is_cuda and acc.dtype != G.dtype:
        torch.addmm(acc, G, W, out_dtype=acc.dtype, out=acc)
        return
    step = len(W) if acc.dtype == G.dtype else 1024  # small wide copies
    for g, w in zip(G.split(step, 1), W.split(step), strict=True):
        acc.addmm_(g.to(acc.dtype), w.to(acc.dtype))


class RowLogprobs(torch.autograd.Function):
    """The head's GEMMs around the row kernels. With out= a GEMM needs no new buffer and ignores autocast."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, inv_tau, width, keep):
        N, V = len(hidden), len(weight)
        stats = Stats.empty(inv_tau)
        buffer = hidden.new_empty(N * width)
        for cols in slices(V, width) if N else []:
            x = buffer[: N * (cols.stop - cols.start)].view(N, -1)
            torch.mm(hidden, weight[cols].t(), out=x)
            forward_rows(x, targets, inv_tau, stats, cols.start)
        ctx.save_for_backward(hidden, weight, targets, inv_tau, stats.xmax, stats.total.log())
        ctx.width, ctx.keep, ctx.buffer = width, keep, buffer if keep else None
        return stats.logp(inv_tau)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        if ctx.keep and ctx.buffer is None:
            again = "row_logprobs: a second backward, but the first one wrote the gradient over the kept"
            raise RuntimeError(f"{again} logits; logit_bytes below their size recomputes them")
        buffer, ctx.buffer = ctx.buffer, None
        hidden, weight, targets, inv_tau, *stats = ctx.saved_tensors
        src = nonzero_first(g)
        h, *rest = hidden, targets, inv_tau, *stats, g.to(inv_tau.dtype)
        if src is not None:  # h[n, d] and the rest [n], in the order of src
            h, *rest = (t[src] for t in (h, *rest))
        n, V = len(h), len(weight)
        wide = inv_tau.dtype if ctx.width < V else h.dtype  # one GEMM rounds once; slices need a wide sum
        dh = torch.zeros_like(h, dtype=wide) if ctx.needs_input_grad[0] else None
        dW = (torch.empty_like if n else torch.zeros_like)(weight) if ctx.needs_input_grad[1] else None
        if not ctx.keep:
            buffer = hidden.new_empty(n * ctx.width)
        for cols in slices(V, ctx.width) if n else []:
            if ctx.keep:
                x, moved = buffer.view(-1, V), src
            else:
                x, moved = buffer[: n * (cols.stop - cols.start)].view(n, -1), None
                torch.mm(h, weight[cols].t(), out=x)
            backward_rows_(x, moved, *rest, cols.start)
            G = x[:n]
            if dh is not None:
                add_product_(dh, G, weight[cols])
            if dW is not None:
                torch.mm(G.t(), h, out=dW[cols])
        if dh is not None:
            dh = dh.to(h.dtype)
            dh = dh if src is None else torch.zeros_like(hidden).index_copy_(0, src, dh)
        return dh, dW, None, None, None, None


def row_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float | Tensor = 1.0, *,
    logit_bytes: int = LOGIT_BYTES,
) -> Tensor:  # fmt: skip
    """hidden[N, d], weight[V, d], targets[N] int64 -> logp[N], in nats.

    hidden and weight share one floating dtype and get gradients in it; logp is float32, float64 from float64.
    temperature: one positive number or one a row, [N]; it gets no gradient.
    logit_bytes: the most memory for logits. If all [N, V] fit they are kept for backward, which can then run
    only once; if not, they are recomputed in slices of as many columns as fit, 128 at least.
    Raises ValueError that names the argument: wrong type, shape, dtype or device, a target outside [0, V), a
    temperature that is not positive; RuntimeError at a second backward through kept logits."""
    if not isinstance(hidden, Tensor) or hidden.dim() != 2 or not hidden.is_floating_point():
        raise ValueError(f"hidden must be floating-point [N, d], got {described(hidden)}")
    N, d = hidden.shape
    V = max(1, len(weight)) if isinstance(weight, Tensor) and weight.dim() else 1
    expect("weight", weight, hidden.dtype, [V, d], hidden.device)
    expect("targets", targets, torch.int64, [N], hidden.device)
    wide = torch.promote_types(hidden.dtype, torch.float32)  # to compute in
    tau = torch.as_tensor(temperature, dtype=wide, device=hidden.device)
    if tau.requires_grad or tau.shape not in ((), (N,)):
        raise ValueError(f"temperature must be a number or [{N}] without gradient, got {described(tau)}")
    outside = (targets < 0) | (targets >= V)
    refuse({f"targets must lie in [0, V) = [0, {V})": outside, "temperature must be positive": ~(tau > 0)})

    tile = 128 * max(N, 1) * hidden.element_size()  # bytes of 128 columns, which keep accesses aligned
    most = max(logit_bytes // tile, 1) * 128
    fits = N * V * hidden.element_size() <= logit_bytes
    width = V if fits else min(V, 128 * ceil(V / 128 / ceil(V / most)))  # about equal slices
    keep = fits and torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return RowLogprobs.apply(hidden, weight, targets, (1 / tau).expand(N).contiguous(), width, keep)


def dual_segment_logprobs(
    hidden: Tensor, weight: Tensor, ids: Tensor, action_mask: Tensor, observation_mask: Tensor,
    action_temperature: float = 1.0, observation_temperature: float = 1.0, *, logit_bytes: int = LOGIT_BYTES,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """hidden[B, T, d], weight[V, d], ids[B, T], masks[B, T] -> logp_action[Na], logp_observation[No]

    A mask marks the tokens to score. The hidden state before a token scores it: the caller shifts nothing and
    can't mark token 0. Each result is float32 (float64 from float64) in row-major (b, t) order of its
    mask, as ids[mask] would be; an empty mask gives an empty result that still backpropagates zeros. One
    temperature a segment: the sampler's for actions, usually 1 for observations. Both segments share one call
    of row_logprobs, whose logit_bytes applies.
    Raises ValueError that names the argument: as row_logprobs, a marked token 0, masks that overlap."""
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        raise ValueError(f"hidden must be [B, T, d], got {described(hidden)}")
    (B, T, d), masks = hidden.shape, {"action_mask": action_mask, "observation_mask": observation_mask}
    expect("ids", ids, torch.int64, [B, T], hidden.device)
    for name, mask in masks.items():
        expect(name, mask, torch.bool, [B, T], hidden.device)
    taus = {"action_temperature": action_temperature, "observation_temperature": observation_temperature}
    for name, tau in taus.items():
        if not tau > 0:
            raise ValueError(f"{name} must be positive, got {tau}")
    overlap = action_mask & observation_mask
    refuse({
        "action_mask marks token 0, which no hidden state precedes": action_mask[:, :1],
        "observation_mask marks token 0, which no hidden state precedes": observation_mask[:, :1],
        "action_mask and observation_mask overlap: a token belongs to one segment": overlap,
    })  # fmt: skip
    segments = [mask.flatten().nonzero()[:, 0] for mask in masks.values()]  # flat (b, t): [Na], [No]
    split, rows = [len(segment) for segment in segments], torch.cat(segments)  # rows[N]
    h = hidden.reshape(B * T, d).index_select(0, rows - 1)  # the shift; t >= 1, so the same b
    tau = torch.tensor(list(taus.values()), dtype=torch.float64).repeat_interleave(torch.tensor(split))
    return row_logprobs(h, weight, ids.flatten()[rows], tau, logit_bytes=logit_bytes).split(split)


def head_weight(model: nn.Module) -> Tensor:
    """The weight[V, d] of a Hugging Face model's output head, tied or not; refuses a head that is more: a
    LoRA-wrapped one would silently train nothing; a bias, a soft cap or a logit scale would be left out."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        raise TypeError(f"model: the output head must be a plain nn.Linear without bias, got {head!r}")
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(model.config, name, None) not in (None, 1):
            raise ValueError(f"model: config.{name} = {getattr(model.config, name)} is not part of this head")
    return head.weight


def described(value) -> str:
    tensor = isinstance(value, Tensor)
    return f"{value.dtype} {list(value.shape)} on {value.device}" if tensor else type(value).__name__


def expect(name: str, value, dtype: torch.dtype, shape: list[int], device: torch.device) -> None:
    if described(value) != (wanted := f"{dtype} {shape} on {device}"):
        raise ValueError(f"{name} must be {wanted}, got {described(value)}")


def refuse(wrong: dict[str, Tensor]) -> None:
    """Raises ValueError with the first message whose tensor holds a True; waits for the device once."""
    found = torch.stack([at.any() for at in wrong.values()]).tolist()
    for message, is_wrong in zip(wrong, found, strict=True):
        if is_wrong:
            raise ValueError(message)
