"""What the Triton kernels compile to and how many bytes they move, found without a GPU.

    python -m kernels.aot        # two markdown tables

Ahead-of-time compilation gives registers, spills, instructions and access widths for every architecture.
The interpreter runs the same kernels on a CPU: counting the 32-byte sectors of logits that loads and stores
touch gives the memory traffic. At least, forward reads every logit once and backward reads and writes it.
"""

import re
import subprocess
import tempfile
from collections import Counter
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import triton
import triton.language as tl
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.interpreter import InterpretedFunction, interpreter_builder

from kernels import logit_rows

ARCHITECTURES = {80: "A100", 89: "L4, RTX 40", 90: "H100, H200", 100: "B200", 120: "RTX 50"}
SECTOR = 32  # bytes: the least that a GPU's memory moves


def compiled(kernel, arch: int, dtype: str, aligned: bool = True):
    """A kernel of logit_rows compiled for logits of dtype "bf16" or "fp32". aligned: V is divisible by 16."""
    constants = {"MOVED": True, "BLOCK": logit_rows.BLOCK}
    types = {"x": f"*{dtype}", "y": "*i64", "src": "*i64", "first": "i32", "V": "i32"}
    types |= dict.fromkeys(constants, "constexpr")
    names = kernel.arg_names
    signature = {name: types.get(name, "*fp32") for name in names}
    hints = [name not in ("first", *constants) and (name != "V" or aligned) for name in names]
    attrs = {(i,): [["tt.divisibility", 16]] for i, hint in enumerate(hints) if hint}
    source = ASTSource(kernel, signature, {n: v for n, v in constants.items() if n in names}, attrs)
    options = {"num_warps": logit_rows.WARPS}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm


def resources(asm: dict) -> dict:
    """Registers a thread, stack and spilled bytes, instructions a logit in the loop, access widths in bytes.

    A width is that of the loads (stores) that carry the most bytes: the logits, or in forward the results.
    """
    target = re.search(r"\.target (sm_(\d+)\w*)", asm["ptx"])
    tools = Path(nvidia.__file__).parent / "bin"
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(asm["ptx"])
        ptxas = str(tools / ("ptxas-blackwell" if int(target[2]) >= 100 else "ptxas"))
        command = [ptxas, "-v", f"-arch={target[1]}", str(ptx), "-o", str(cubin)]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        command = [str(tools / "cuobjdump"), "-sass", str(cubin)]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    stack, stores, loads = map(int, re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", log))
    jumps = re.findall(r"/\*([0-9a-f]{4,})\*/\s+[^;]*?\bBRA[^;]*?(0x[0-9a-f]+)", sass)
    loop = max(int(at, 16) - int(to, 16) for at, to in jumps) // 16  # 16 bytes an instruction
    carried = {"ld": Counter(), "st": Counter()}
    for op, vector, bits in re.findall(r"\b(ld|st)\.global(?:\.\w+)*?(?:\.v(\d))?\.[bfu](\d+)", asm["ptx"]):
        width = int(vector or 1) * int(bits) // 8
        carried[op][width] += width
    return {
        "registers": int(re.search(r"Used (\d+) registers", log)[1]),
        "stack": stack,
        "spills": stores + loads,
        "instructions": round(loop * 32 * logit_rows.WARPS / logit_rows.BLOCK, 1),
        "load": carried["ld"].most_common(1)[0][0],
        "store": carried["st"].most_common(1)[0][0],
    }


@contextmanager
def interpreter():
    """Inside, the Triton path of logit_rows runs on CPU tensors, whatever TRITON_INTERPRET says."""
    with ExitStack() as stack:
        for name in ("forward_kernel", "backward_kernel"):
            kernel = InterpretedFunction(getattr(logit_rows, name).fn)
            stack.enter_context(patch.object(logit_rows, name, kernel))
        # The interpreter stands in for tl.reduce, but can't enter the compiled tl.max and tl.sum around it.
        for name, combine in (("max", tl.standard._elementwise_max), ("sum", tl.standard._sum_combine)):
            reduce = partial(lambda combine, x, axis: tl.reduce(x, axis, combine), combine)
            stack.enter_context(patch.object(tl, name, reduce))
        stack.enter_context(patch.object(logit_rows, "uses_triton", lambda x: x.dtype != torch.float64))
        stack.enter_context(np.errstate(over="ignore", invalid="ignore"))  # as silent as a GPU at inf and nan
        yield


@contextmanager
def traffic():
    """Inside interpreter(): counts the bytes of bf16 memory, which only the logits are, loaded and stored."""
    count = Counter()

    def counting(access, name):
        def call(pointers, *args):
            if pointers.get_element_ty() == tl.bfloat16:
                mask = args[0 if name == "load" else 1].data
                count[name] += SECTOR * len({int(a) // SECTOR for a in pointers.data[mask]})
            return access(pointers, *args)

        return call

    load, store = interpreter_builder.create_masked_load, interpreter_builder.create_masked_store
    with (
        patch.object(interpreter_builder, "create_masked_load", counting(load, "load")),
        patch.object(interpreter_builder, "create_masked_store", counting(store, "store")),
    ):
        yield count


def bytes_per_row(V: int, n: int = 2) -> dict[str, int]:
    """Bytes of bf16 logits [n, V] that the kernels move for one row."""
    x, y = torch.randn(n, V).bfloat16(), torch.randint(V, (n,))
    ones = torch.ones(n)
    stats = logit_rows.Stats.empty(ones)
    with interpreter():
        with traffic() as forward:
            logit_rows.forward_rows(x, y, ones, stats)
        with traffic() as backward:
            logit_rows.backward_rows_(x, None, y, ones, stats.xmax, stats.total.log(), ones)
    moved = {"forward": forward, "backward": backward}
    return {f"{k} {op}": c[op] // n for k, c in moved.items() for op in ("load", "store")}


def main():
    kernels = {"forward": logit_rows.forward_kernel, "backward": logit_rows.backward_kernel}
    print("| GPU | kernel | logits | V | registers | stack | spills | SASS a logit | load, B | store, B |")
    print("|---|---|---|---|--:|--:|--:|--:|--:|--:|")
    for arch, gpu in ARCHITECTURES.items():
        for name, kernel in kernels.items():
            for dtype, aligned in (("bf16", True), ("fp32", True), ("bf16", False)):
                cells = resources(compiled(kernel, arch, dtype, aligned)).values()
                V = "multiple of 16" if aligned else "odd"
                print(f"| sm_{arch} ({gpu}) | {name} | {dtype} | {V} | {' | '.join(map(str, cells))} |")
    print("\n| V | kernel | bytes a row | least possible | ratio |\n|--:|---|--:|--:|--:|")
    for V in (49152, 151936):
        moved = bytes_per_row(V)
        for name, passes in (("forward", 1), ("backward", 2)):
            total, least = moved[f"{name} load"] + moved[f"{name} store"], 2 * V * passes
            print(f"| {V} | {name} | {total} | {least} | {total / least:.4f} |")


if __name__ == "__main__":
    main()
