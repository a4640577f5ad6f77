"""The loss head against float64: kernels, their twin, autograd, the shift and the masks, memory, errors.

Without a GPU the Triton kernels run in Triton's interpreter; with one they are compiled and run there.
"""

from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import logit_rows
from kernels.segment_logprob import dual_segment_logprobs, head_weight, nonzero_first, row_logprobs

triton = pytest.importorskip("triton")
from kernels import aot  # noqa: E402

GPU = torch.cuda.is_available()
TOLERANCE = 5e-6


def rounding(n):
    """What the order of a float32 sum of n terms may change, relative to their size."""
    return 4 * 2**-24 * n**0.5


@pytest.fixture(params=["torch", "triton"])
def device(request):
    """Runs a test once on each path of logit_rows and says where its tensors live."""
    with aot.interpreter() if request.param == "triton" and not GPU else nullcontext():
        yield "cuda" if request.param == "triton" and GPU else "cpu"


def reference(x, y, tau):
    """float64 logp[N] of logits x[N, V], written as the definition."""
    return torch.log_softmax(x.double() / tau.double()[:, None], dim=1).gather(1, y[:, None])[:, 0]


def close(got, want, tolerance=TOLERANCE):
    """Values: within tolerance, relative where |want| > 1."""
    assert got.shape == want.shape
    error = ((got.double() - want).abs() / want.abs().clamp(min=1)).nan_to_num(9).flatten().tolist()
    assert max(error, default=0) <= tolerance


def gradients_close(got, want, tolerance=TOLERANCE):
    """Gradients: within tolerance of max |want|."""
    assert got.shape == want.shape
    if want.numel():
        error = (got.double() - want).abs().max() / want.abs().max().clamp(min=1e-30)
        assert error.nan_to_num(9).item() <= tolerance


def run_rows(x, y, tau, g, src=None, first=0):
    """logp and gradient of logits by the path that logit_rows picks; src as in backward_rows_.

    first > 0 hands the columns over in two slices, the second of which begins there.
    """
    inv_tau = 1 / tau
    stats = logit_rows.Stats.empty(inv_tau)
    parts = [x] if not first else [x[:, :first].contiguous(), x[:, first:].contiguous()]
    for part, start in zip(parts, (0, first), strict=False):
        logit_rows.forward_rows(part, y, inv_tau, stats, start)
    rest = (y, inv_tau, stats.xmax, stats.total.log(), g)
    for part, start in zip(parts, (0, first), strict=False):
        logit_rows.backward_rows_(part, src, *(t if src is None else t[src] for t in rest), start)
    return stats.logp(inv_tau), torch.cat(parts, 1)


# ---- the row kernels ----


SHAPES = [(1, 1), (1, 151936), (2, 129920), (31, 5003), (257, 501), (5, 4096), (3, 16)]


@pytest.mark.parametrize("N, V", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_match_float64_of_the_same_logits(device, N, V, dtype):
    torch.manual_seed(N + V)
    x = (3 * torch.randn(N, V)).to(dtype)
    y = torch.randint(V, (N,))
    y[0], y[-1] = 0, V - 1
    tau, g = 0.5 + torch.rand(N), torch.randn(N)
    z = x.double().requires_grad_()
    logp = reference(z, y, tau)
    logp.backward(g.double())
    got = run_rows(*(t.to(device) for t in (x.clone(), y, tau, g)), first=V // 3)
    close(got[0].cpu(), logp.detach())
    rounding = 2**-8 if GPU or not logit_rows.uses_triton(x) else 2**-7  # the interpreter truncates to bf16
    gradients_close(got[1].cpu(), z.grad, TOLERANCE if dtype == torch.float32 else rounding)


def test_rows_with_huge_and_infinite_logits(device):
    inf, big = float("inf"), torch.finfo(torch.float32).max
    x = torch.randn(6, 5003)
    x[0] *= 1e4
    x[1, ::2] = -inf
    x[2, 1:] = -inf  # one survivor: logp 0
    x[3, 7] = 3e4
    x[4, ::3] = -big
    x[5] = -big  # all masked alike: uniform
    y = torch.tensor([9, 1, 0, 7, 1, 2])
    tau, g = torch.tensor([1.0, 0.3, 2.0, 1.0, 0.01, 1.0]), torch.ones(6)
    z = x.double().requires_grad_()
    logp = reference(z, y, tau)
    logp.backward(g.double())
    got = run_rows(*(t.to(device) for t in (x.clone(), y, tau, g)))
    close(got[0].cpu(), logp.detach())
    for row in range(6):
        gradients_close(got[1][row].cpu(), z.grad[row])


def test_rows_keep_nan_and_a_forbidden_target(device):
    x = torch.randn(3, 40)
    x[0, 3], x[1, 5], x[2, 6] = float("nan"), float("inf"), -float("inf")
    got = run_rows(*(t.to(device) for t in (x, torch.tensor([1, 5, 6]), torch.ones(3), torch.ones(3))))
    assert got[0][:2].isnan().all()
    assert got[0][2].item() == -float("inf")


def test_rows_moved_in_place(device):
    g = torch.tensor([0.0, 1.0, 0.0, 0.0, -2.0, 0.5])
    src = nonzero_first(g)
    assert src.tolist() == [4, 1, 5]
    x, y, tau = torch.randn(6, 300), torch.randint(300, (6,)), torch.ones(6)
    z = x.double().requires_grad_()
    reference(z, y, tau).backward(g.double())
    got = run_rows(*(t.to(device) for t in (x, y, tau, g, src)))[1][:3]
    gradients_close(got.cpu(), z.grad[src])


def test_zero_gradient_rows_leave_room_without_a_race():
    for p in (0.0, 0.1, 0.5, 0.9, 1.0):
        g = (torch.rand(200) < p).float()
        src, n = nonzero_first(g), int(g.sum())
        if n == 200:
            assert src is None
            continue
        assert sorted(src.tolist()) == g.nonzero()[:, 0].tolist()
        assert all(s == i or s >= n for i, s in enumerate(src.tolist()))  # moved rows come from beyond n


@pytest.mark.skipif(GPU, reason="looks at addresses in the interpreter")
def test_row_offsets_pass_two_to_the_31():
    V, row = 151936, 14135
    x, y, ones = torch.zeros(1, V, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int64), torch.ones(1)
    builder, tl = aot.interpreter_builder, aot.tl
    load, store, seen = builder.create_masked_load, builder.create_masked_store, []

    def first_row(pointers):  # the same element of row 0, so that nothing beyond the tensors is touched
        if pointers.get_element_ty() == tl.bfloat16:
            seen.append(int(pointers.data.min()) - x.data_ptr())
            assert row * V * 2 <= seen[-1] < (row + 1) * V * 2
        size = pointers.get_element_ty().primitive_bitwidth // 8
        return type(pointers)(pointers.data - row * size * (V if size == 2 else 1), pointers.dtype)

    program_id = type(builder).create_get_program_id
    with (
        aot.interpreter(),
        patch.object(builder, "create_masked_load", lambda p, *a: load(first_row(p), *a)),
        patch.object(builder, "create_masked_store", lambda p, *a: store(first_row(p), *a)),
        patch.object(type(builder), "create_get_program_id", lambda *a: shifted(program_id(*a), row)),
    ):
        stats = logit_rows.Stats.empty(ones)
        logit_rows.forward_rows(x, y, ones, stats)
        logit_rows.backward_rows_(x, None, y, ones, stats.xmax, stats.total.log(), ones)
    assert row * V > 2**31 and min(seen) == row * V * 2


def shifted(handle, by):
    return type(handle)(handle.data + by, handle.dtype)


# ---- the head: autograd, chunks, memory ----


def head_inputs(N=37, V=53, d=16, dtype=torch.float32):
    torch.manual_seed(1)
    hidden = torch.randn(N, d).to(dtype).requires_grad_()
    weight = torch.randn(V, d).to(dtype).requires_grad_()
    g = torch.randn(N)
    g[::3] = 0
    return hidden, weight, torch.randint(V, (N,)), 0.5 + torch.rand(N), g


@pytest.mark.parametrize("logit_bytes", [1 << 30, 300_000, 0])
@pytest.mark.parametrize("N", [0, 1, 31, 257])
def test_head_matches_float64(device, N, logit_bytes):
    hidden, weight, y, tau, g = head_inputs(N, 501)
    h, W = (t.detach().double().requires_grad_() for t in (hidden, weight))
    logp = reference(h @ W.t(), y, tau)
    want = torch.autograd.grad(logp, (h, W), g.double())
    got = row_logprobs(*(t.to(device) for t in (hidden, weight, y, tau)), logit_bytes=logit_bytes)
    assert got.dtype == torch.float32
    close(got.cpu(), logp.detach())
    for have, wanted in zip(torch.autograd.grad(got, (hidden, weight), g.to(device)), want, strict=True):
        gradients_close(have, wanted)


def test_paths_agree():
    hidden, weight, y, tau, g = head_inputs(31, 5003)
    results = []
    for context in (nullcontext(), nullcontext() if GPU else aot.interpreter()):
        at = "cuda" if GPU and results else "cpu"
        with context:
            logp = row_logprobs(hidden.to(at), weight.to(at), y.to(at), tau.to(at))
            results.append((logp.detach(), *torch.autograd.grad(logp, (hidden, weight), g.to(at))))
    for a, b in zip(*results, strict=True):
        close(a.cpu(), b.double().cpu(), rounding(5003) if GPU else 2e-6)  # a GEMM there adds up otherwise


def test_gradcheck_of_the_recompute_path():
    hidden, weight, y, tau, _ = head_inputs(5, 131, 3, torch.float64)  # slices of 128 and 3 columns
    y[0] = 130
    assert torch.autograd.gradcheck(lambda h, W: row_logprobs(h, W, y, tau, logit_bytes=0), (hidden, weight))


@pytest.mark.parametrize("frozen", [0, 1])
def test_one_input_may_be_frozen(frozen):
    hidden, weight, y, tau, g = head_inputs()
    want = torch.autograd.grad(row_logprobs(hidden, weight, y, tau), (hidden, weight), g)
    inputs = [hidden, weight]
    inputs[frozen] = inputs[frozen].detach()
    row_logprobs(*inputs, y, tau).backward(g)
    assert torch.equal(inputs[1 - frozen].grad, want[1 - frozen])


def test_tied_head():
    _, weight, y, _, g = head_inputs(37, 53, 16)
    row_logprobs(weight[y.flip(0)] * 2, weight, y).backward(g)
    W = weight.detach().double().requires_grad_()
    reference((W[y.flip(0)] * 2) @ W.t(), y, torch.ones(37)).backward(g.double())
    gradients_close(weight.grad, W.grad)


def test_bf16_hidden_gradient_adds_slices_in_float32():
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 8).bfloat16().requires_grad_(), (1 + torch.rand(128 * 200, 8)).bfloat16()
    y = torch.randint(128 * 200, (4,))
    row_logprobs(hidden, weight, y, logit_bytes=0).sum().backward()  # 200 slices
    h = hidden.detach().double().requires_grad_()
    reference(h @ weight.double().t(), y, torch.ones(4)).sum().backward()
    gradients_close(hidden.grad, h.grad, 2e-2)  # the logits' own rounding; a bf16 sum is far worse


def test_bf16_head_end_to_end():
    hidden, weight, y, tau, g = head_inputs(64, 501, 32, torch.bfloat16)
    x = (hidden @ weight.t()).detach()
    logp = row_logprobs(hidden, weight, y, tau)
    close(logp.detach(), reference(x, y, tau))  # the logits' own rounding is not the kernel's
    assert [t.dtype for t in torch.autograd.grad(logp, (hidden, weight), g)] == [torch.bfloat16] * 2


def test_second_backward_needs_recomputed_logits():
    hidden, weight, y, tau, g = head_inputs()
    logp = row_logprobs(hidden, weight, y, tau)
    logp.backward(g, retain_graph=True)
    with pytest.raises(RuntimeError, match="logit_bytes"):
        logp.backward(g, retain_graph=True)
    logp = row_logprobs(hidden, weight, y, tau, logit_bytes=0)
    first, second = (torch.autograd.grad(logp, weight, g, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_autocast_changes_nothing():
    hidden, weight, y, tau, g = head_inputs()
    want = torch.autograd.grad(row_logprobs(hidden, weight, y, tau), weight, g)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = torch.autograd.grad(row_logprobs(hidden, weight, y, tau), weight, g)[0]
    assert torch.equal(got, want)


class Largest(TorchDispatchMode):
    """Remembers the most elements that any operator's result has."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.untyped_storage().nbytes():
            self.numel = max(self.numel, out.untyped_storage().nbytes() // out.element_size())
        return out


@pytest.mark.parametrize("kept", [True, False])
def test_logits_stay_in_their_budget(kept):
    hidden, weight, y, tau, g = head_inputs(300, 3000, 4)
    need = 300 * 3000 * 4
    with patch.object(logit_rows, "TORCH_BLOCK", 3000 * 10), Largest() as largest:
        logp = row_logprobs(hidden, weight, y, tau, logit_bytes=need if kept else need // 10)
        logp.backward(g)
    assert largest.numel == 300 * (3000 if kept else 256)  # 300 whole columns fit, of which slices take 256


# ---- both segments ----


def segments(B=3, T=9, V=11, d=4):
    torch.manual_seed(2)
    hidden, weight = torch.randn(B, T, d, dtype=torch.float64), torch.randn(V, d, dtype=torch.float64)
    roles = torch.randint(3, (B, T))
    roles[:, 0] = 0
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(V, (B, T)), roles == 1, roles == 2


def test_segments_own_the_shift_the_order_and_the_temperature():
    hidden, weight, ids, action, observation = segments()
    got = dual_segment_logprobs(hidden, weight, ids, action, observation, 0.7, 1.3)
    for k, (mask, tau) in enumerate(((action, 0.7), (observation, 1.3))):
        places = [(b, t) for b in range(3) for t in range(9) if mask[b, t]]
        logits = torch.stack([weight @ hidden[b, t - 1] for b, t in places]) / tau
        p = torch.softmax(logits, 1)
        want = torch.stack([row[ids[b, t]].log() for row, (b, t) in zip(p, places, strict=True)])
        torch.testing.assert_close(got[k], want)
    # the gradients of the same sum through autograd of the whole [B, T, V] log-softmax
    x = (hidden @ weight.t())[:, :-1]
    pick = [torch.log_softmax(x / tau, 2).gather(2, ids[:, 1:, None])[..., 0] for tau in (0.7, 1.3)]
    want = (pick[0] * action[:, 1:] - 2 * pick[1] * observation[:, 1:]).sum()
    got = got[0].sum() - 2 * got[1].sum()
    for pair in zip(*(torch.autograd.grad(loss, (hidden, weight)) for loss in (got, want)), strict=True):
        torch.testing.assert_close(*pair)


@pytest.mark.parametrize("empty", ["action", "observation", "both"])
def test_an_empty_segment_backpropagates_zeros(empty):
    hidden, weight, ids, action, observation = segments()
    action = action & (empty == "observation")
    observation = observation & (empty == "action")
    a, o = dual_segment_logprobs(hidden, weight, ids, action, observation)
    assert (len(a), len(o)) == (action.sum(), observation.sum())
    (a.sum() + o.sum()).backward()
    assert (hidden.grad.abs().sum() > 0) == (weight.grad.abs().sum() > 0) == (empty != "both")


def test_rows_outside_the_masks_do_not_matter():
    hidden, weight, ids, action, observation = segments()
    want = dual_segment_logprobs(hidden, weight, ids, action, observation)
    used = (action | observation).roll(-1, 1)
    got = dual_segment_logprobs(hidden.where(used[..., None], float("nan")), weight, ids, action, observation)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def broken(name, value):
    hidden, weight, ids, action, observation = segments()
    arguments = {
        "hidden": hidden,
        "weight": weight,
        "ids": ids,
        "action_mask": action,
        "observation_mask": observation,
        "action_temperature": 1.0,
        "observation_temperature": 1.0,
    }
    return arguments | {name: value(arguments[name])}


@pytest.mark.parametrize(
    "name, value",
    [
        ("hidden", lambda t: t[0]),
        ("weight", lambda t: t.float()),
        ("weight", lambda t: t[:, :-1]),
        ("weight", lambda t: nn.Linear(4, 11)),
        ("ids", lambda t: t[:, :-1]),
        ("ids", lambda t: t.int()),
        ("action_mask", lambda t: t.float()),
        ("action_mask", lambda t: torch.ones_like(t)),
        ("observation_mask", lambda t: t[:2]),
        ("observation_mask", lambda t: t | torch.tensor([True] + 8 * [False])),
        ("observation_mask", lambda t: None),
        ("observation_mask", lambda t: t.to("meta")),
        ("action_temperature", lambda t: 0.0),
        ("observation_temperature", lambda t: -1.0),
        ("observation_temperature", lambda t: float("nan")),
    ],
)
def test_segment_errors_name_the_argument(name, value):
    with pytest.raises(ValueError, match=name):
        dual_segment_logprobs(**broken(name, value))


def test_overlap_is_refused():
    hidden, weight, ids, action, observation = segments()
    with pytest.raises(ValueError, match=r"action_mask and observation_mask overlap"):
        dual_segment_logprobs(hidden, weight, ids, action, observation | action)


@pytest.mark.parametrize(
    "name, value",
    [
        ("hidden", lambda t: t.long()),
        ("hidden", lambda t: t[None]),
        ("weight", lambda t: t[:0]),
        ("weight", lambda t: t.bfloat16()),
        ("targets", lambda t: t[:-1]),
        ("targets", lambda t: t.int()),
        ("targets", lambda t: t.index_fill(0, torch.tensor([3]), 53)),
        ("targets", lambda t: t.index_fill(0, torch.tensor([3]), -100)),
        ("temperature", lambda t: t[:-1]),
        ("temperature", lambda t: t.index_fill(0, torch.tensor([3]), 0.0)),
        ("temperature", lambda t: t.requires_grad_()),
        ("temperature", lambda t: 0.0),
    ],
)
def test_row_errors_name_the_argument(name, value):
    arguments = dict(zip(("hidden", "weight", "targets", "temperature"), head_inputs(), strict=False))
    with pytest.raises(ValueError, match=f"^{name}"):
        row_logprobs(**arguments | {name: value(arguments[name])})


def test_head_weight_refuses_what_it_would_ignore():
    class Lora(nn.Linear):
        pass

    def model(head, **config):
        return SimpleNamespace(get_output_embeddings=lambda: head, config=SimpleNamespace(**config))

    plain = nn.Linear(4, 7, bias=False)
    assert head_weight(model(plain, final_logit_softcapping=None, logit_scale=1.0)) is plain.weight
    for head, config in (
        (Lora(4, 7, bias=False), {}),
        (nn.Linear(4, 7), {}),
        (None, {}),
        (plain, {"final_logit_softcapping": 30.0}),
        (plain, {"logit_scale": 0.0625}),
    ):
        with pytest.raises((TypeError, ValueError), match="model"):
            head_weight(model(head, **config))


# ---- what the kernels compile to ----


@pytest.mark.parametrize("arch", [90, *(pytest.param(a, marks=pytest.mark.slow) for a in (80, 89, 100, 120))])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_no_spills_and_wide_accesses(arch, dtype):
    forward = aot.resources(aot.compiled(logit_rows.forward_kernel, arch, dtype))
    backward = aot.resources(aot.compiled(logit_rows.backward_kernel, arch, dtype))
    assert forward["spills"] == backward["spills"] == forward["stack"] == backward["stack"] == 0
    assert forward["load"] == backward["load"] == backward["store"] == 16


@pytest.mark.skipif(GPU, reason="counts in the interpreter")
def test_every_logit_moves_once():
    moved = aot.bytes_per_row(49152)
    assert moved["forward store"] == 0
    for name, least in (("forward load", 1), ("backward load", 1), ("backward store", 1)):
        assert least <= moved[name] / (2 * 49152) <= 1.05


# ---- on a GPU ----


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [1.0, 0.3])
def test_head_on_a_gpu(dtype, share):
    torch.manual_seed(0)
    N, V, d = 1024, 151936, 512
    hidden = torch.randn(N, d, device="cuda").to(dtype).requires_grad_()
    weight = (torch.randn(V, d, device="cuda") / d**0.5).to(dtype).requires_grad_()
    y, g = torch.randint(V, (N,), device="cuda"), torch.randn(N, device="cuda")
    g[::3] = 0
    need = N * V * hidden.element_size()
    logp = row_logprobs(hidden, weight, y, 0.7, logit_bytes=int(need * share))
    got = torch.autograd.grad(logp, (hidden, weight), g)
    h, W = (t.detach().double().requires_grad_() for t in (hidden, weight))
    want = reference(h @ W.t(), y, torch.full((N,), 0.7, device="cuda"))
    close(logp, want.detach(), 1e-5 if dtype == torch.float32 else 5e-2)
    for have, wanted in zip(got, torch.autograd.grad(want, (h, W), g.double()), strict=True):
        gradients_close(have, wanted, rounding(V) if dtype == torch.float32 else 2e-2)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_row_offsets_on_a_gpu():
    N, V = 14200, 151936  # 2.2e9 logits
    x, y = torch.zeros(N, V, dtype=torch.bfloat16, device="cuda"), torch.arange(N, device="cuda")
    ones = torch.ones(N, device="cuda")
    x[-1, N - 1] = 5.0
    stats = logit_rows.Stats.empty(ones)
    logit_rows.forward_rows(x, y, ones, stats)
    p = torch.softmax(x[-1].double(), 0)
    close(stats.logp(ones)[-1:], p[N - 1 : N].log())
    logit_rows.backward_rows_(x, None, y, ones, stats.xmax, stats.total.log(), ones)
    gradients_close(x[-1], F.one_hot(y[-1], V) - p, 2**-8)
