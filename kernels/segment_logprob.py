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
Beyond it they are computed chunk by chunk and once more in backward: a fourth GEMM for a bounded buffer.
Prompt and padding rows never reach the head; rows with g = 0 (clipped, or of an equal group) skip dh and dW.

logit_rows.py does what happens to the logits themselves: two Triton kernels and their twin in plain torch.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kernels.logit_rows import backward_rows_, forward_rows

LOGIT_BYTES = 3 << 30  # keeps the logits of 10,600 rows at V = 151,936 in bf16

# ---- autograd ----


def nonzero_first(g: Tensor) -> Tensor | None:
    """g[N] -> src[n]: the n rows with g != 0, each in its own place if that is below n; None if n = N.

    A nonzero row at n or beyond takes the place of a zero row below n. So sources beyond n are never written,
    and kept logits can be compacted in place by programs that run in any order.
    """
    active = g != 0
    n = int(active.sum())
    if n == len(g):
        return None
    src = torch.arange(n, device=g.device)
    src[~active[:n]] = n + active[n:].nonzero()[:, 0]
    return src


def add_outer_(acc: Tensor, G: Tensor, h: Tensor, first: bool):
    """acc[V, d] += G[n, V]^T h[n, d]. acc is float32 where chunks of bf16 add up: bf16 loses the small."""
    if acc.dtype == G.dtype:
        acc.addmm_(G.t(), h, beta=0 if first else 1)
        return
    wide = {"out_dtype": acc.dtype} if G.is_cuda else {}  # a CPU rounds each chunk's share, never the sum
    for a in range(0, len(acc), 1 << 13):  # tiles of V bound the temporary
        rows = slice(a, a + (1 << 13))
        acc[rows] += torch.mm(G[:, rows].t(), h, **wide)


class RowLogprobs(torch.autograd.Function):
    """The head's GEMMs around the row kernels. With out= a GEMM needs no new buffer and ignores autocast."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, inv_tau, step, keep, want_entropy):
        N, V = len(hidden), len(weight)
        x = hidden.new_empty(min(step, N), V)
        out = [torch.empty_like(inv_tau) for _ in range(3 + want_entropy)]
        for a in range(0, N, step):
            rows = slice(a, min(a + step, N))
            chunk = torch.mm(hidden[rows], weight.t(), out=x[: rows.stop - a])
            forward_rows(chunk, targets[rows], inv_tau[rows], [o[rows] for o in out])
        ctx.save_for_backward(hidden, weight, targets, inv_tau, *out[1:3])
        ctx.step, ctx.keep, ctx.x = step, keep, x if keep else None
        if want_entropy:
            ctx.mark_non_differentiable(out[3])
        return out[0], out[3] if want_entropy else None

    @staticmethod
    @once_differentiable
    def backward(ctx, g, _):
        if ctx.keep and ctx.x is None:
            raise RuntimeError(
                "row_logprobs: a second backward, but the first one wrote the gradient over the kept logits; "
                "logit_bytes below their size recomputes them"
            )
        x, ctx.x = ctx.x, None
        hidden, weight, targets, inv_tau, *stats = ctx.saved_tensors
        src = nonzero_first(g)
        h, *rest = hidden, targets, inv_tau, *stats, g.to(inv_tau.dtype)
        if src is not None:  # h[n, d] and the rest [n], in the order of src
            h, *rest = (t[src] for t in (h, *rest))
        n, V = len(h), len(weight)
        whole = ctx.keep or n <= ctx.step
        dh = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        dW = None
        if ctx.needs_input_grad[1]:  # one GEMM rounds once; chunks need a wide sum
            wide = weight.dtype if whole else inv_tau.dtype
            new = weight.new_empty if n and wide == weight.dtype else weight.new_zeros
            dW = new(V, weight.shape[1], dtype=wide)
        if x is None:
            x = hidden.new_empty(min(ctx.step, n), V)
        step = max(n, 1) if whole else ctx.step
        for a in range(0, n, step):
            rows = slice(a, min(a + step, n))
            G = x[: rows.stop - a]
            if not ctx.keep:
                torch.mm(h[rows], weight.t(), out=G)
            backward_rows_(x if ctx.keep else G, src if ctx.keep else None, *(t[rows] for t in rest))
            if dh is not None:
                torch.mm(G, weight, out=dh[rows])
            if dW is not None:
                add_outer_(dW, G, h[rows], first=a == 0)
        if dh is not None and src is not None:
            dh = torch.zeros_like(hidden).index_copy_(0, src, dh)
        return dh, None if dW is None else dW.to(weight.dtype), None, None, None, None, None


# ---- what callers use ----


def row_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    logit_bytes: int = LOGIT_BYTES,
    return_entropy: bool = False,
):
    """hidden[N, d], weight[V, d], targets[N] int64 -> logp[N], in nats.

    hidden and weight share one floating dtype and get gradients in it; logp is float32, float64 from float64.
    temperature: one positive number or one a row, [N]; it gets no gradient.
    logit_bytes: the most memory for logits. If all N rows fit they are kept for backward, which can then run
    only once; if not, they are recomputed in equal chunks of as many rows as fit, one at least.
    return_entropy: return (logp, entropy[N]), the entropy in nats and without gradient.

    Raises TypeError or ValueError that names the argument: wrong type, shape, dtype or device, a target
    outside [0, V), a temperature that is not positive; RuntimeError at a second backward through kept logits.
    """
    inv_tau = checked_inverse_temperature(hidden, weight, targets, temperature)
    N, V = len(hidden), len(weight)
    need = N * V * hidden.element_size()
    grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    chunks = min(N, -(-need // max(logit_bytes, 1)))
    step = -(-N // max(chunks, 1))
    keep = grad and chunks <= 1
    logp, entropy = RowLogprobs.apply(hidden, weight, targets, inv_tau, max(step, 1), keep, return_entropy)
    return (logp, entropy) if return_entropy else logp


def dual_segment_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    action_mask: Tensor,
    observation_mask: Tensor,
    action_temperature: float = 1.0,
    observation_temperature: float = 1.0,
    *,
    logit_bytes: int = LOGIT_BYTES,
    return_entropy: bool = False,
):
    """hidden[B, T, d], weight[V, d], ids[B, T], masks[B, T] -> logp_action[Na], logp_observation[No]

    A mask marks the tokens to score. The hidden state before a token scores it: the caller shifts nothing and
    can't mark token 0. Each result is float32 (float64 from float64) in row-major (b, t) order of its
    mask, as ids[mask] would be; an empty mask gives an empty result that still backpropagates zeros. One
    temperature a segment: the sampler's for actions, usually 1 for observations. Both segments share one call
    of row_logprobs, whose logit_bytes and errors apply. With return_entropy the result is
    (logp_action, logp_observation, entropy_action, entropy_observation).

    Raises ValueError or TypeError that names the argument: wrong shape or dtype, a marked token 0, masks that
    overlap, a temperature that is not positive.
    """
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        raise ValueError(f"hidden must have shape [B, T, d], got {shape_of(hidden)}")
    (B, T, d), masks = hidden.shape, {"action_mask": action_mask, "observation_mask": observation_mask}
    for name, value in {"ids": ids, **masks}.items():
        if shape_of(value) != shape_of(hidden[..., 0]):
            raise ValueError(f"{name} must have shape [B, T] = [{B}, {T}], got {shape_of(value)}")
        if value.dtype != (torch.int64 if name == "ids" else torch.bool):
            raise TypeError(f"{name} must be {'int64' if name == 'ids' else 'bool'}, got {value.dtype}")
    taus = {"action_temperature": action_temperature, "observation_temperature": observation_temperature}
    for name, tau in taus.items():
        if not tau > 0:
            raise ValueError(f"{name} must be positive, got {tau}")
    first = [mask[:, :1].any() for mask in masks.values()]
    *first, overlap = torch.stack([*first, (action_mask & observation_mask).any()]).tolist()
    if any(first):
        name = "action_mask" if first[0] else "observation_mask"
        raise ValueError(f"{name} marks token 0, which no hidden state precedes")
    if overlap:
        raise ValueError("action_mask and observation_mask overlap: a token belongs to one segment")

    segments = [mask.flatten().nonzero()[:, 0] for mask in masks.values()]  # flat (b, t): [Na], [No]
    split, rows = [len(segment) for segment in segments], torch.cat(segments)  # rows[N]
    h = hidden.reshape(B * T, d).index_select(0, rows - 1)  # the shift; t >= 1, so the same b
    tau = torch.tensor(list(taus.values()), dtype=torch.float64).repeat_interleave(torch.tensor(split))
    options = {"logit_bytes": logit_bytes, "return_entropy": return_entropy}
    out = row_logprobs(h, weight, ids.flatten()[rows], tau, **options)
    return (*out[0].split(split), *out[1].split(split)) if return_entropy else out.split(split)


def head_weight(model: nn.Module) -> Tensor:
    """The weight[V, d] of a Hugging Face model's output head, tied or not; refuses a head that is more.

    Reading .weight off a LoRA-wrapped head would silently train nothing; a bias, a soft cap or a logit scale
    would silently be left out.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        raise TypeError(f"model: the output head must be a plain nn.Linear without bias, got {head!r}")
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(model.config, name, None) not in (None, 1):
            raise ValueError(f"model: config.{name} = {getattr(model.config, name)} is not part of this head")
    return head.weight


def shape_of(value) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def checked_inverse_temperature(hidden, weight, targets, temperature) -> Tensor:
    """Checks the arguments of row_logprobs; returns 1 / temperature, [N], in the dtype to compute in."""
    for name, value, axes in (("hidden", hidden, "[N, d]"), ("weight", weight, "[V, d]")):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor {axes}, got {type(value).__name__}")
        if value.dim() != 2:
            raise ValueError(f"{name} must have shape {axes}, got {shape_of(value)}")
    (N, d), V = hidden.shape, len(weight)
    if weight.shape[1] != d or V == 0:
        raise ValueError(f"weight must have shape [V, d] with d = {d} as in hidden, got {shape_of(weight)}")
    if (weight.dtype, weight.device) != (hidden.dtype, hidden.device):
        pair = f"{weight.dtype} on {weight.device} and {hidden.dtype} on {hidden.device}"
        raise TypeError(f"weight and hidden must share dtype and device, got {pair}")
    if shape_of(targets) != f"[{N}]" or targets.dtype != torch.int64 or targets.device != hidden.device:
        raise ValueError(f"targets must be int64 [N] = [{N}] on {hidden.device}, got {shape_of(targets)}")
    wide = torch.promote_types(hidden.dtype, torch.float32)
    tau = torch.as_tensor(temperature, dtype=wide, device=hidden.device)
    if tau.requires_grad or tau.shape not in ((), (N,)):
        raise ValueError(f"temperature must be a number or [N] = [{N}] without gradient, got {shape_of(tau)}")
    outside = ((targets < 0) | (targets >= V)).any()
    outside, positive = torch.stack([outside, (tau > 0).all()]).tolist()  # one wait for the device
    if outside:
        raise ValueError(f"targets must lie in [0, V) = [0, {V})")
    if not positive:
        raise ValueError("temperature must be positive")
    return (1 / tau).expand(N).contiguous()
