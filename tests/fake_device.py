"""A GPU in costume: real CPU tensors that say they live on the device "gpu", and a watch on every operator.

    with fake_device.gpu() as watch:
        model.to("gpu") ...
    assert watch.total("wait") == 3, watch

What would fail on a real GPU raises RuntimeError: an operator on tensors of both sides, but for what CUDA
allows (numbers, copies, index tensors of the host), and a kernel of ours that is given a tensor of the host.
What makes the host wait is counted with the line of this repository that asked: a wait for results (.item(),
.tolist(), a copy to the host, nonzero, boolean indexing ...), and a copy to the device, which torch ends with
a wait of its own. Not covered: numerics and races of CUDA kernels, streams, memory, which attention runs, the
states of adamw8bit (a costume over a costume).
"""

import sys
from collections import Counter
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import set_checkpoint_early_stop

from kernels import segment_logprob

ROOT = Path(__file__).parent.parent
aten = torch.ops.aten
COPIES = aten.copy_.default, aten._to_copy.default
INDEXING = aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default
WAITS = {
    aten._local_scalar_dense.default: ".item()", aten.nonzero.default: "nonzero", aten.equal.default: "equal",
    aten.masked_select.default: "masked_select", aten._unique2.default: "unique",
    aten.repeat_interleave.Tensor: "repeat_interleave",
}  # fmt: skip


class Hook(backend_registration._DummyPrivateUse1Hook):
    def is_available(self) -> bool:  # to who asks for any accelerator there is none: the other tests
        return False


class Module(backend_registration._DummyBackendModule):
    def is_available(self) -> bool:
        return False

    def get_amp_supported_dtype(self) -> list:  # activation checkpointing asks
        return [torch.bfloat16]


# on import, as torch counts devices at a process's first backward
backend_registration._setup_privateuseone_for_python_backend("gpu", Module(), Hook())


class OnGpu(torch.Tensor):
    """A tensor on the device; what it holds is the CPU tensor `inner`."""

    is_cuda = property(lambda self: True)  # the library asks for it
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        place = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "device": "gpu:0"}
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, **place)

    def __init__(self, inner: torch.Tensor):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return execute(func, args, kwargs or {}, Watch())  # outside gpu(): unwatched

    def tolist(self):
        return self.to("cpu").tolist()

    def untyped_storage(self):
        return self.inner.untyped_storage()

    def __reduce_ex__(self, protocol):  # saved as the numbers that it holds
        return self.inner.detach().__reduce_ex__(protocol)

    def __repr__(self, **_):
        return f"OnGpu({self.inner!r})"


def bare(tree):
    return tree_map(lambda t: t.inner if isinstance(t, OnGpu) else t, tree)


# torch.tensor(..., device="gpu") passes every mode by and asks for these two
LIBRARY = torch.library.Library("aten", "IMPL")
watching: list["Watch"] = []


def empty_strided(size, stride, dtype=None, **_):
    return OnGpu(torch.empty_strided(size, stride, dtype=dtype))


def copy_from(source, to, non_blocking=False):
    for watch in watching:
        watch.saw("copy", "to the device")
    to.inner.copy_(source)
    return to


LIBRARY.impl("empty_strided", empty_strided, "PrivateUse1")
LIBRARY.impl("_copy_from", copy_from, "PrivateUse1")


class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = Counter()  # ("wait" or "copy", what, where) -> times

    def saw(self, kind: str, what: str) -> None:
        self.seen[kind, what, place()] += 1

    def total(self, kind: str) -> int:
        return sum(n for (k, _, _), n in self.seen.items() if k == kind)

    def __repr__(self):
        return "\n".join(f"{n:5} {kind}: {what}, {at}" for (kind, what, at), n in sorted(self.seen.items()))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with self:  # in inference mode an operator made of others comes whole
            result = func.decompose(*args, **kwargs or {})
        return execute(func, args, kwargs or {}, self) if result is NotImplemented else result


def place() -> str:
    """The innermost line of this repository that is not in this file."""
    frame = sys._getframe()
    while frame:
        name = frame.f_code.co_filename
        if name.startswith(f"{ROOT}/") and "/.venv/" not in name and name != __file__:
            return f"{name[len(str(ROOT)) + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back
    return "backward"


def execute(func, args, kwargs, watch: Watch):
    """Run an operator on what its tensors hold. -> its results, on the device if it works there."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    here = [t for t in tensors if isinstance(t, OnGpu)]
    target = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
    if not here and target != "gpu":
        return func(*args, **kwargs)
    if here:
        check(func, args, tensors, watch)
    elif func is aten._to_copy.default:
        watch.saw("copy", "to the device")
    plain, options = bare((args, kwargs))
    if target is not None:
        options["device"] = "cpu"
    to_host = func in COPIES and (target == "cpu" or (func is aten.copy_.default and args[0] is plain[0]))
    if to_host:
        watch.saw("wait", "copy to the host")
    if func in (aten.addmm.dtype, aten.addmm.dtype_out):  # bfloat16 products added up in float32
        result = plain[0] + plain[1].to(plain[3]) @ plain[2].to(plain[3])
        return args[0].copy_(OnGpu(result)) if kwargs.get("out") is args[0] else OnGpu(result)
    result = func(*plain, **options)
    if to_host or target not in (None, "gpu"):
        return result
    same = {id(t.inner): t for t in here}  # an operator in place returns what it was given

    def dressed(value):
        return same.get(id(value)) if id(value) in same else OnGpu(value)

    return tree_map(lambda value: dressed(value) if isinstance(value, torch.Tensor) else value, result)


def check(func, args, tensors, watch: Watch) -> None:
    """Raises RuntimeError for what CUDA refuses; notes what the host waits for."""
    strangers = [t for t in tensors if not isinstance(t, OnGpu) and t.dim()]
    if func in INDEXING:
        indices = [i for i in args[1] if i is not None]
        strangers = [t for t in strangers if not any(t is i for i in indices)]
        if any(not isinstance(i, OnGpu) for i in indices):
            watch.saw("copy", "index to the device")
        number = len(args) > 2 and args[2].numel() == 1  # masked_fill
        if any(i.dtype == torch.bool for i in indices) and not number:
            watch.saw("wait", "boolean index")
    elif func in COPIES:
        if strangers and isinstance(args[0], OnGpu):
            watch.saw("copy", "to the device")
        return
    if strangers:
        where = [f"{list(t.shape)} on {'gpu' if isinstance(t, OnGpu) else 'cpu'}" for t in tensors]
        raise RuntimeError(f"tensors on two devices: {func} of {', '.join(where)} at {place()}")
    if func in WAITS:
        watch.saw("wait", WAITS[func])


def kernel(twin):
    """A Triton kernel's twin in plain torch, in its place: every tensor must be on the device."""

    def launched(*args):
        tensors = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
        if any(not isinstance(t, OnGpu) for t in tensors):
            raise RuntimeError(f"tensors on two devices: {twin.__name__} got one of the host, at {place()}")
        twin(*bare(args))

    return launched


def moved(module, *args, **kwargs):
    """nn.Module.to, which gives a costume to each parameter of a tied pair."""
    MODULE_TO(module, *args, **kwargs)
    if hasattr(module, "tie_weights"):
        module.tie_weights()
    return module


MODULE_TO = torch.nn.Module.to


@contextmanager
def gpu():
    """-> the Watch of all that happens inside."""
    watch = Watch()
    with ExitStack() as stack:
        stack.enter_context(patch.object(torch.nn.Module, "to", moved))
        # a guard in Python bears neither torch's own thread in backward nor an exception
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(set_checkpoint_early_stop(False))
        for name in ("forward_rows", "backward_rows_"):
            twin = kernel(getattr(segment_logprob, name))
            stack.enter_context(patch.object(segment_logprob, name, twin))
        watching.append(watch)
        stack.callback(watching.pop)
        yield stack.enter_context(watch)
