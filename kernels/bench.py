"""The loss head side by side with its peers: time, peak memory above the inputs, error against float64.

    python -m kernels.bench              # CPU: N=2048 V=32000 d=1024 float32; GPU: the head of Qwen3-8B, bf16
    python -m kernels.bench --rows 8192 --vocab 151936 --hidden 4096 --dtype bfloat16

Every contender turns hidden states, head weight and targets into the gradients of the summed log-probability
of the active rows. Rounds are interleaved, so that a slow minute of the machine hits all alike; ratios are
taken within a round. An inactive row has weight 0 and stays in the batch: who can leave it out may. Brackets
hold the median with 95 % or more. Peers come with `pip install .[bench]`; without it they are left out.
"""

import argparse
import ctypes
import gc
import time
from math import sqrt
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import logit_rows
from kernels.segment_logprob import row_logprobs

MiB = 1 << 20

# ---- contenders: (hidden[N, d], weight[V, d], targets[N], active[N]) -> logp[N or active], or a loss ----


def naive(hidden, weight, targets, active):
    logits = (hidden @ weight.t()).float()
    return torch.log_softmax(logits, dim=1).gather(1, targets[:, None])[:, 0]


def torch_linear_cross_entropy(hidden, weight, targets, active):
    """Only a sum or a mean over rows: no log-probabilities, no gradient of one's own per row."""
    options = {"reduction": "sum", "options": torch.nn.LinearCrossEntropyOptions()}
    return -F.linear_cross_entropy(hidden, weight, targets.masked_fill(~active, -100), **options)


def ours(share):
    """Our head with room for this share of the active rows' logits (1: all of them are kept)."""

    def head(hidden, weight, targets, active):
        rows = active.nonzero()[:, 0]
        room = int(share * len(rows) * len(weight) * hidden.element_size())
        return row_logprobs(hidden.index_select(0, rows), weight, targets[rows], logit_bytes=room)

    return head


def contenders() -> dict:
    found = {"naive log_softmax + gather": naive}
    try:
        from trl.trainer.utils import selective_log_softmax

        found["TRL selective_log_softmax"] = lambda h, W, y, _: selective_log_softmax(h @ W.t(), y)
    except ImportError as error:
        print(f"TRL is left out: {error}")
    try:
        from trl.kernels import ChunkedLogProbFunction as trl

        def trl_chunked(hidden, weight, targets, active):
            if hidden.is_cuda:  # as TRL itself does: only there it leaves rows out
                hidden, targets = hidden[active], targets[active]
            return trl.apply(hidden, weight, None, targets, 1.0, 32768, None, 1.0, ())[0]  # its own chunk

        found["TRL chunked"] = trl_chunked
    except ImportError as error:
        print(f"TRL chunked is left out: {error}")
    try:
        from liger_kernel.chunked_loss.fused_linear_ppo import _ChunkedSelectiveLogProbFunction as liger

        found["Liger chunked"] = lambda h, W, y, active: liger.apply(h, W, y, None, 1.0, 4096)
    except ImportError as error:
        print(f"Liger is left out: {error}")
    if hasattr(F, "linear_cross_entropy"):
        found["torch linear_cross_entropy"] = torch_linear_cross_entropy
    return found | {"**ours, logits kept**": ours(1), "**ours, lean** (1/4 of them)": ours(1 / 4)}


# ---- measuring ----


class Peak:
    """Peak memory in MiB above what was there at the start: of the device, or of the process on a CPU."""

    def __init__(self, device: str):
        self.device = device

    def __enter__(self):
        gc.collect()
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
            self.start = self.status("VmRSS")
        return self

    def __exit__(self, *_):
        top = torch.cuda.max_memory_allocated() if self.device == "cuda" else self.status("VmHWM")
        self.MiB = (top - self.start) / MiB

    @staticmethod
    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


def seconds(call, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def median(values: list[float]) -> tuple[float, float, float]:
    """Median and an interval that holds the true one with at least 95 %, by order statistics."""
    values, n = sorted(values), len(values)
    low = max(0, int((n - 1.96 * sqrt(n)) / 2) - 1)
    return (values[(n - 1) // 2] + values[n // 2]) / 2, values[low], values[n - 1 - low]


def exact(hidden, weight, targets, active):
    """float64 logp[N], dh, dW of the summed log-probability of the active rows, 256 rows at a time."""
    h, W = hidden.detach().double(), weight.detach().double()
    logp, dh, dW = h.new_zeros(len(h)), torch.zeros_like(h), torch.zeros_like(W)
    for rows in active.nonzero()[:, 0].split(256):
        p = torch.softmax(h[rows] @ W.t(), 1)
        logp[rows] = p.gather(1, targets[rows, None])[:, 0].log()
        G = -p.scatter_add_(1, targets[rows, None], p.new_full((len(rows), 1), -1))
        dh[rows], dW = G @ W, dW.addmm_(G.t(), h[rows])
    return logp, dh, dW


def compare(heads: dict, inputs: dict, active: Tensor, rounds: int, device: str, check: bool):
    """One markdown table: every head, `rounds` times in turn after one round to warm up."""
    hidden, weight, targets = inputs.values()
    times, peaks, errors = ({name: [] for name in heads} for _ in range(3))
    want = exact(hidden, weight, targets, active) if check else None
    for index in range(rounds + 1):
        for name, head in heads.items():
            hidden.grad = weight.grad = None
            result = []

            def step(head=head, result=result):
                out = head(hidden, weight, targets, active)
                loss = out if out.dim() == 0 else (out[active] if len(out) == len(active) else out).sum()
                loss.backward()
                result.append(out.detach())

            with Peak(device) as peak:
                took = seconds(step, device)
            if index:
                times[name].append(took)
                peaks[name].append(peak.MiB)
            elif check:
                out = result[0].double()
                logp = "–"
                if out.dim():
                    got = out[active] if len(out) == len(active) else out
                    logp = f"{(got - want[0][active]).abs().max():.0e}"
                pairs = ((hidden.grad, want[1]), (weight.grad, want[2]))
                grads = [f"{(a.double() - b).abs().max() / b.abs().max():.0e}" for a, b in pairs]
                errors[name] = [logp, *grads]
    first = next(iter(heads))
    unit, scale = ("ms", 1e3) if device == "cuda" else ("s", 1)
    print(f"| head | time, {unit} | / naive | peak, MiB | / naive | logp error | dh error | dW error |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for name in heads:
        mid, low, high = (scale * value for value in median(times[name]))
        ratio = median([a / b for a, b in zip(times[name], times[first], strict=True)])
        memory, base = median(peaks[name])[0], median(peaks[first])[0]
        cells = [f"{mid:.2f} [{low:.2f}, {high:.2f}]", f"{ratio[0]:.2f} [{ratio[1]:.2f}, {ratio[2]:.2f}]"]
        cells += [f"{memory:.0f}", f"{memory / base:.2f}", *(errors[name] or ["–"] * 3)]
        print(f"| {name} | {' | '.join(cells)} |")


def limits(inputs: dict, rounds: int, device: str):
    """The bare GEMMs, and the row kernels alone with the bandwidth that they reach."""
    hidden, weight, targets = (t.detach() for t in inputs.values())
    N, V = len(hidden), len(weight)
    x, dh, dW = hidden @ weight.t(), torch.empty_like(hidden), torch.empty_like(weight)
    ones = torch.ones(N, device=device)
    stats = logit_rows.Stats.empty(ones)
    logit_rows.forward_rows(x, targets, ones, stats)
    calls = {
        "forward GEMM": (lambda: torch.mm(hidden, weight.t(), out=x), 0),
        "dh GEMM": (lambda: torch.mm(x, weight, out=dh), 0),
        "dW GEMM": (lambda: torch.mm(x.t(), hidden, out=dW), 0),
        "forward rows": (lambda: logit_rows.forward_rows(x, targets, ones, stats), 1),
        "backward rows": (
            lambda: logit_rows.backward_rows_(x, None, targets, ones, stats.xmax, stats.total.log(), ones),
            2,
        ),
        "our head": (lambda: whole(inputs), 0),
    }
    times = {name: [] for name in calls}
    for index in range(rounds + 1):
        for name, (call, _) in calls.items():
            took = seconds(call, device)
            if index:
                times[name].append(took)
    print("\n| part | time, ms | GB/s | TFLOP/s |\n|---|--:|--:|--:|")
    for name, (_, passes) in calls.items():
        mid, low, high = median(times[name])
        moved = f"{passes * x.numel() * x.element_size() / mid / 1e9:.0f}" if passes else "–"
        flops = f"{2 * N * V * hidden.shape[1] / mid / 1e12:.2f}" if "GEMM" in name else "–"
        print(f"| {name} | {mid * 1e3:.2f} [{low * 1e3:.2f}, {high * 1e3:.2f}] | {moved} | {flops} |")
    gemms = sum(median(times[name])[0] for name in calls if "GEMM" in name)
    print(f"\nour head / bare GEMMs: {median(times['our head'])[0] / gemms:.3f}")


def whole(inputs: dict):
    hidden, weight, targets = inputs.values()
    hidden.grad = weight.grad = None
    row_logprobs(hidden, weight, targets, logit_bytes=1 << 62).sum().backward()


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = {"cuda": (8192, 151936, 4096, "bfloat16"), "cpu": (2048, 32000, 1024, "float32")}[device]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=size[0], help="N")
    parser.add_argument("--vocab", type=int, default=size[1], help="V")
    parser.add_argument("--hidden", type=int, default=size[2], help="d")
    parser.add_argument("--dtype", default=size[3], choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--active", type=float, nargs="*", default=[1.0, 0.4], help="shares of active rows")
    parser.add_argument("--no_check", action="store_true", help="skip the float64 reference")
    args = parser.parse_args()

    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    inputs = {
        "hidden": torch.randn(args.rows, args.hidden, device=device).to(dtype).requires_grad_(),
        "weight": (torch.randn(args.vocab, args.hidden, device=device) / sqrt(args.hidden)).to(dtype),
        "targets": torch.randint(args.vocab, (args.rows,), device=device),
    }
    inputs["weight"].requires_grad_()
    heads = contenders()
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}: N={args.rows} V={args.vocab} d={args.hidden} {args.dtype}")
    for share in args.active:
        active = torch.zeros(args.rows, dtype=torch.bool, device=device)
        active[torch.randperm(args.rows, device=device)[: round(share * args.rows)]] = True
        print(f"\n{share:.0%} of the rows active, {args.rounds} rounds\n")
        compare(heads, inputs, active, args.rounds, device, not args.no_check)
    limits(inputs, args.rounds, device)


if __name__ == "__main__":
    main()
