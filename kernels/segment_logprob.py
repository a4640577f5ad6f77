"""Log-probabilities of chosen tokens under a language-model head: both losses of ECHO from one forward pass.

Axis letters: B batch, T time, N rows that carry a loss, V vocabulary, d hidden size.

A row is one hidden state h[d] that scores one token y. With x = W h its V logits and tau its temperature,

    z = x / tau,    lse = log sum_v exp(z_v),    logp = z_y - lse,    p = softmax(z)

and since d lse / d z = p, any upstream gradient g = dL/dlogp of that row gives

    dL/dx = G = g (onehot(y) - p) / tau,      dL/dh = G W,      dL/dW = sum over rows of G^T h.

So the head needs nothing of the loss but one number a row: clipped policy gradient on some rows and
cross-entropy on others are plain torch over two slices of logp. The work is three GEMMs over N x V (x, dh, dW),
one read of the logits in forward, and one read and write in place in backward (G written over x).

Memory: logits that fit in `logit_bytes` are kept from forward to backward. Beyond it they are computed chunk
by chunk and once more in backward: a fourth GEMM for a bounded buffer. Prompt and padding rows never reach the
head (dual_segment_logprobs gathers rows first), and rows with g = 0 leave before the gradient GEMMs.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LOGIT_BYTES = 3 << 30  # keeps the logits of 10,600 rows at V = 151,936 in bf16
BLOCK_ELEMENTS = 1 << 18  # logits that the torch path works on at one time: they stay in a CPU's cache


# ---- rows of logits, plain torch ----


def forward_torch(x: Tensor, y: Tensor, inv_tau: Tensor, want_entropy: bool):
    """x[n, V], y[n], inv_tau[n] -> logp[n], xmax[n], logsum[n], entropy[n] or None, in inv_tau's dtype.

    lse is kept in two parts, xmax / tau and logsum, because huge logits would round their sum away.
    """
    n, V = x.shape
    logp, xmax, logsum = (torch.empty_like(inv_tau) for _ in range(3))
    entropy = torch.empty_like(inv_tau) if want_entropy else None
    step = max(1, BLOCK_ELEMENTS // V)
    for a in range(0, n, step):
        rows = slice(a, a + step)
        block = x[rows].to(inv_tau.dtype)
        top = block.amax(dim=1, keepdim=True)
        z = (block - top).mul_(inv_tau[rows, None])  # [step, V], at most 0
        chosen = z.gather(1, y[rows, None])
        e = z.exp() if want_entropy else z.exp_()
        total = e.sum(dim=1, keepdim=True)
        log_total = total.log()
        if want_entropy:  # H = logsum - sum p z, where a -inf logit adds 0
            entropy[rows] = (log_total - e.mul_(z.clamp_(min=-1e4)).sum(dim=1, keepdim=True) / total)[:, 0]
        logp[rows] = (chosen - log_total)[:, 0]
        xmax[rows], logsum[rows] = top[:, 0], log_total[:, 0]
    return logp, xmax, logsum, entropy


def backward_torch_(x: Tensor, src: Tensor | None, y, inv_tau, xmax, logsum, g):
    """Writes row i of G over x[i] for i < len(g), reading the logits of row src[i] (row i where src is None).

    y, inv_tau, xmax, logsum and g, each [n], are in the order of the output rows. A source row beyond n is only
    ever read and one below n is its own output, so nothing is overwritten before it is read.
    """
    n, V = len(g), x.shape[1]
    scale = g * inv_tau
    step = max(1, BLOCK_ELEMENTS // V)
    for a in range(0, n, step):
        rows = slice(a, min(a + step, n))
        block = x[rows] if src is None else x[src[rows]]
        z = block.to(inv_tau.dtype)  # in place below where that is no copy
        z.sub_(xmax[rows, None]).mul_(inv_tau[rows, None]).sub_(logsum[rows, None]).exp_()
        z.mul_(-scale[rows, None]).scatter_add_(1, y[rows, None], scale[rows, None])
        if src is not None or z.dtype != x.dtype:
            x[rows] = z


def row_kernels(x: Tensor):
    """The (forward, backward) pair for logits like x."""
    return forward_torch, backward_torch_


# ---- autograd ----


def add_outer_(acc: Tensor, G: Tensor, h: Tensor):
    """acc[V, d] += G[n, V]^T h[n, d]. A float32 acc sums bf16 chunks without losing the small ones."""
    if acc.dtype == G.dtype:
        acc.addmm_(G.t(), h)
        return
    wide = {"out_dtype": acc.dtype} if G.is_cuda else {}
    for a in range(0, len(acc), 1 << 13):  # tiles of V bound the temporary
        acc[a : a + (1 << 13)] += torch.mm(G[:, a : a + (1 << 13)].t(), h, **wide)


def nonzero_first(g: Tensor) -> Tensor | None:
    """g[N] -> src[n]: the n rows with g != 0, as many as possible in their own place, or None if that is all.

    A nonzero row at n or beyond moves into the place of a zero row below n. Reads at n and beyond and writes
    below n never meet, so the rows can be compacted in place, in any order, by parallel programs.
    """
    active = g != 0
    n = int(active.sum())
    if n == len(g):
        return None
    src = torch.arange(n, device=g.device)
    src[~active[:n]] = n + active[n:].nonzero()[:, 0]
    return src


class RowLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, inv_tau, chunks, keep, want_entropy):
        N, V = len(hidden), len(weight)
        step = max(1, -(-N // chunks))
        buffer = hidden.new_empty(min(step, N), V)
        parts = []
        for a in range(0, max(N, 1), step):
            rows = slice(a, a + step)
            h = hidden[rows]
            x = torch.mm(h, weight.t(), out=buffer[: len(h)])  # out= also keeps autocast away from the dtype
            parts.append(row_kernels(x)[0](x, targets[rows], inv_tau[rows], want_entropy))
        logp, xmax, logsum, entropy = (
            p[0] if chunks == 1 or p[0] is None else torch.cat(p) for p in zip(*parts, strict=True)
        )
        ctx.save_for_backward(hidden, weight, targets, inv_tau, xmax, logsum)
        ctx.step, ctx.keep, ctx.logits = step, keep, buffer if keep else None
        if want_entropy:
            ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, g, _):
        hidden, weight, targets, inv_tau, xmax, logsum = ctx.saved_tensors
        if ctx.keep and ctx.logits is None:
            raise RuntimeError(
                "row_logprobs: second backward through kept logits, which the first one overwrote with their "
                "gradient; a smaller logit_bytes recomputes them"
            )
        x, ctx.logits = ctx.logits, None
        g = g.to(inv_tau.dtype)
        src = nonzero_first(g)
        stats = (targets, inv_tau, xmax, logsum, g)
        h, stats = (hidden, stats) if src is None else (hidden[src], [s[src] for s in stats])
        n, V = len(h), len(weight)
        need_h, need_w = ctx.needs_input_grad[:2]
        dh = torch.empty_like(h) if need_h else None
        whole = x is not None or n <= ctx.step
        wide = weight.dtype if whole or weight.dtype == torch.float64 else torch.float32
        dW = None
        if need_w:
            dW = weight.new_empty(weight.shape) if whole and n else weight.new_zeros(weight.shape, dtype=wide)
        buffer = hidden.new_empty(min(ctx.step, n), V) if x is None else x
        for a in range(0, n, n if whole else ctx.step):
            rows = slice(a, min(a + ctx.step, n))
            G = buffer[: rows.stop - a]
            if x is None:
                torch.mm(h[rows], weight.t(), out=G)
            row_kernels(G)[1](buffer, None if x is None else src, *(s[rows] for s in stats))
            if need_h:
                torch.mm(G, weight, out=dh[rows])
            if need_w and whole:
                torch.mm(G.t(), h, out=dW)
            elif need_w:
                add_outer_(dW, G, h[rows])
        if need_h and src is not None:
            dh = torch.zeros_like(hidden).index_copy_(0, src, dh)
        if need_w:
            dW = dW.to(weight.dtype)
        return dh, dW, None, None, None, None, None


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

    hidden and weight share one floating dtype and get gradients in it; logp is float32 (float64 from float64).
    temperature: one positive number or one a row, [N]; it gets no gradient.
    logit_bytes: the most memory for logits. If all N rows fit they are kept for backward, which can then run
    only once; if not, they are recomputed in chunks of as many rows as fit, one at least.
    return_entropy: return (logp, entropy[N]), the entropy in nats and without gradient.

    Raises TypeError or ValueError that names the argument: wrong type, shape, dtype or device, a target outside
    [0, V), a temperature that is not positive.
    """
    inv_tau = checked_inverse_temperature(hidden, weight, targets, temperature)
    N, V = len(hidden), len(weight)
    need = N * V * hidden.element_size()
    grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    keep = grad and need <= logit_bytes
    chunks = max(1, min(N, -(-need // max(logit_bytes, 1))))
    logp, entropy = RowLogprobs.apply(hidden, weight, targets, inv_tau, chunks, keep, return_entropy)
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
    """hidden[B, T, d], weight[V, d], ids[B, T] int64, masks[B, T] bool -> (logp_action[Na], logp_observation[No])

    A mask marks the tokens to score. The hidden state before a token scores it, so token 0 can't be marked, and
    the caller shifts nothing. Each result is float32 (float64 from float64) in row-major (b, t) order of its
    mask, as ids[mask] would be; an empty mask gives an empty result that still backpropagates zeros. One
    temperature a segment: the sampler's for actions, usually 1 for observations. Both segments share one pass of
    row_logprobs, whose logit_bytes and errors apply. return_entropy: (logp_action, logp_observation,
    entropy_action, entropy_observation).

    Raises ValueError where the masks overlap or mark token 0.
    """
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        raise ValueError(f"hidden must be a tensor of shape [B, T, d], got {shape_of(hidden)}")
    B, T, d = hidden.shape
    masks = {"action_mask": action_mask, "observation_mask": observation_mask}
    for name, value in {"ids": ids, **masks}.items():
        if not isinstance(value, Tensor) or value.shape != (B, T):
            raise ValueError(f"{name} must have shape [B, T] = [{B}, {T}], got {shape_of(value)}")
        if name in masks and value.dtype != torch.bool:
            raise TypeError(f"{name} must be bool, got {value.dtype}")
    first = [mask[:, :1].any() for mask in masks.values()]
    *first, overlap = torch.stack([*first, (action_mask & observation_mask).any()]).tolist()  # one device wait
    for name, marked in zip(masks, first, strict=True):
        if marked:
            raise ValueError(f"{name} marks token 0: nothing precedes it")
    if overlap:
        raise ValueError("action_mask and observation_mask overlap: a token belongs to one segment")

    action, observation = (mask.flatten().nonzero()[:, 0] for mask in masks.values())
    tokens = torch.cat([action, observation])  # [N] flat (b, t)
    split = [len(action), len(observation)]
    temperature = hidden.new_empty(len(tokens), dtype=torch.promote_types(hidden.dtype, torch.float32))
    temperature[: split[0]], temperature[split[0] :] = action_temperature, observation_temperature
    out = row_logprobs(
        hidden.reshape(B * T, d).index_select(0, tokens - 1),
        weight,
        ids.reshape(-1)[tokens],
        temperature,
        logit_bytes=logit_bytes,
        return_entropy=return_entropy,
    )
    if not return_entropy:
        return out.split(split)
    logp, entropy = out
    return *logp.split(split), *entropy.split(split)


def head_weight(model: nn.Module) -> Tensor:
    """The weight[V, d] of a Hugging Face model's output head, tied or not. Refuses a head that is not just W h.

    Reading .weight off a LoRA-wrapped head would silently train nothing; a soft cap, a bias or a logit scale
    would silently be left out.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        raise TypeError(f"model: the output head must be a plain nn.Linear without bias, got {head!r}")
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier_scale"):
        if getattr(model.config, name, None) not in (None, 1, 1.0):
            raise ValueError(f"model: config.{name} = {getattr(model.config, name)} is not part of this head")
    return head.weight


def shape_of(value) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def checked_inverse_temperature(hidden, weight, targets, temperature) -> Tensor:
    """Checks the arguments of row_logprobs; returns 1 / temperature, [N], in the dtype to compute in."""
    for name, value, dim in (("hidden", hidden, "[N, d]"), ("weight", weight, "[V, d]")):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor {dim}, got {type(value).__name__}")
        if value.dim() != 2 or not value.is_floating_point():
            raise ValueError(f"{name} must be floating point {dim}, got {value.dtype} {shape_of(value)}")
    (N, d), (V, width) = hidden.shape, weight.shape
    if width != d or V == 0:
        raise ValueError(f"weight must have shape [V, d] with d = {d} as in hidden, got {shape_of(weight)}")
    if weight.dtype != hidden.dtype or weight.device != hidden.device:
        pair = f"{weight.dtype} on {weight.device} and {hidden.dtype} on {hidden.device}"
        raise TypeError(f"weight and hidden must share dtype and device, got {pair}")
    if not isinstance(targets, Tensor) or targets.shape != (N,) or targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64 of shape [N] = [{N}], got {shape_of(targets)}")
    if N and not 0 <= int(targets.min()) <= int(targets.max()) < V:
        raise ValueError(f"targets must lie in [0, {V}), got {int(targets.min())} to {int(targets.max())}")
    wide = torch.promote_types(hidden.dtype, torch.float32)
    tau = torch.as_tensor(temperature, dtype=wide, device=hidden.device)
    if tau.requires_grad or tau.shape not in ((), (N,)):
        raise ValueError(f"temperature must be a number or [N] = [{N}] without gradient, got {shape_of(tau)}")
    if not bool((tau > 0).all()):
        raise ValueError("temperature must be positive")
    return (1 / tau).expand(N).contiguous()
