"""What an instruction of a compiled TPU program does: FLOPs, bytes through HBM, and which part of the model it is.

Kernels say nothing of themselves in the program. Theirs is counted from their operands, as if every row were one
document: lightning attention as the tokens and heads that it works on, splash attention by half of its pairs, megablox
by all the rows of its buffer, of which a dropless exchange may leave most empty. Half of the pairs is what causal
attention of a whole row has, and each step of a ring in the zigzag layout; in the contiguous layout it is the ranks'
mean, and the last rank has up to twice that. A row so long that it runs in pieces is counted short: each piece as if it
saw its own tokens alone.
"""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np

from mmx.plan.hlo import Array, Instruction, Program, arrays
from pallas_kernels.softmax_attention.tpu_blocks import PRODUCTS

# Files of ours and the part of the model that they are; the innermost known frame of an instruction decides.
PARTS = {
    "lightning_attention": "lightning attention",
    "model/lightning.py": "lightning attention",
    "parallel/lasp.py": "lightning attention",
    "softmax_attention": "softmax attention",
    "model/softmax.py": "softmax attention",
    "model/rope.py": "softmax attention",
    "parallel/ring.py": "softmax attention",
    "model/experts.py": "experts",
    "grouped_matmul": "experts",
    "model/router.py": "routing and exchange",
    "parallel/exchange.py": "routing and exchange",
    "parallel/dispatch.py": "routing and exchange",
    "parallel/ragged.py": "routing and exchange",
    "parallel/global_router.py": "routing and exchange",
    "cross_entropy": "head and loss",
    "train/loss.py": "head and loss",
    "model/block.py": "norms and residuals",
    "model/text.py": "embedding and stack",
    "optax": "optimizer",
    "train/step.py": "optimizer",
}
OTHER = "other"
# What calls splash attention's kernels with rows by themselves, not as steps of a ring.
_WHOLE_ROWS = "softmax_attention/tpu.py"
_FREE = ("parameter", "constant", "bitcast", "get-tuple-element", "tuple", "after-all", "partition-id", "iota")


@dataclasses.dataclass(frozen=True)
class Work:
    """Of one run of an instruction."""

    flops: float = 0.0
    bytes: float = 0.0  # read from and written to HBM

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)


@dataclasses.dataclass(frozen=True)
class Splash:
    """What decides how fast splash attention's kernels are."""

    kernel: str  # one of ``PRODUCTS``
    tokens: int  # of a row, or of what a rank holds of it
    whole_row: bool  # not a step of a ring
    every_core: bool  # forward, or in two halves of the heads


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A Pallas kernel's call."""

    name: str
    flops: float
    token_heads: int = 0  # of lightning attention
    splash: Splash | None = None  # of splash attention
    grouped: tuple[int, int] | None = None  # of megablox: rows and groups


def part(program: Program, instruction: Instruction) -> str:
    """The part of the model that an instruction belongs to, one of the values of ``PARTS`` or ``OTHER``."""
    for file, _ in program.source(instruction):
        for ending, name in PARTS.items():
            if ending in file:
                return name
    return OTHER


def work(program: Program, body: dict[str, Instruction], instruction: Instruction) -> Work:
    """FLOPs and bytes of an instruction that is no loop and no collective.

    Args:
      body: the computation's instructions by name, where operands are looked up.
    """
    if instruction.operation in _FREE or instruction.operation.endswith(("-start", "-done")):
        return Work()
    if instruction.operation == "custom-call":
        known = kernel(program, body, instruction)
        return Work(known.flops, _io(body, instruction)) if known else Work()
    if instruction.operation == "fusion":
        return _fusion(program, body, instruction)
    if instruction.operation in ("convolution", "dot"):
        return Work(_product_flops(body, instruction), _io(body, instruction))
    return Work(0.0, _io(body, instruction))


def kernel(program: Program, body: dict[str, Instruction], instruction: Instruction) -> Kernel | None:
    """The Pallas kernel that a custom call runs, or None for one of XLA's own."""
    if "tpu_custom_call" not in instruction.rest:
        return None
    name = re.sub(r"[.\d]+$", "", instruction.name)
    operands = [a for o in instruction.operands if o in body for a in arrays(body[o].result)]
    results = arrays(instruction.result)
    if name.startswith("lightning_attention"):
        state = next(a for a in results if a.dtype == "f32" and len(a.shape) == 4)
        *_, K, V = state.shape
        tokens = max((a for a in results if a.dtype != "f32"), key=lambda a: a.size, default=results[0])
        token_heads = math.prod(tokens.shape) // V
        # The recurrent form: what has to be done, whatever the kernel's blocks add.
        passes = 1 if "forward" in name else 2
        return Kernel(name, passes * token_heads * 4.0 * K * V, token_heads)
    if name.startswith("splash"):
        # Behind the tables, q comes first: [heads, tokens, channels], the two halves of the heads in front where they
        # are halved.
        *heads, S, D = next(a for a in operands if a.dtype in ("bf16", "f32") and len(a.shape) in (3, 4)).shape
        of = next(of for of in PRODUCTS if f"_{of}_" in name)
        # The kernel of all gradients has dq's shares as a result more, a block of keys in front of q's shape.
        if of == "dkv" and any(a.shape[-2:] == (S, D) and len(a.shape) == len(heads) + 3 for a in results):
            of = "fused"
        whole_row = any(file.endswith(_WHOLE_ROWS) for file, _ in program.source(instruction))
        splash = Splash(of, S, whole_row, of == "fwd" or len(heads) > 1)
        return Kernel(name, PRODUCTS[of] * 2.0 * math.prod(heads) * D * S * (S + 1) / 2, splash=splash)
    if "gmm" in name:
        rows = max((a for a in operands if len(a.shape) == 2), key=lambda a: a.size, default=None)
        matrices = max((a for a in (*operands, *results) if len(a.shape) == 3), key=lambda a: a.size, default=None)
        if rows and matrices:
            E, D, F = matrices.shape
            return Kernel(name, 2.0 * rows.shape[0] * D * F, grouped=(rows.shape[0], E))
    return Kernel(name, 0.0)


def _fusion(program: Program, body: dict[str, Instruction], instruction: Instruction) -> Work:
    inside = [i for name in instruction.called("calls") for i in program.body(name)]
    names = {i.name: i for i in inside}
    flops = sum(
        _product_flops(names, i) if i.operation in ("convolution", "dot") else _fusion(program, names, i).flops
        for i in inside
        if i.operation in ("convolution", "dot", "fusion")
    )
    return Work(flops, _fusion_bytes(inside, instruction))


def _fusion_bytes(inside: list[Instruction], instruction: Instruction) -> float:
    """A slice that is read, or updated in place, counts instead of the array that it is a slice of."""
    total, in_place = 0.0, set()
    names = {i.name: i for i in inside}
    for i in inside:
        if i.operation == "dynamic-update-slice" and len(i.operands) > 1:
            in_place.add(i.operands[0])
            update = names.get(i.operands[1])
            total += _hbm(update.result) if update else 0.0
    for parameter in (i for i in inside if i.operation == "parameter"):
        if parameter.name in in_place:
            continue
        users = [i for i in inside if parameter.name in i.operands]
        if users and all(i.operation == "dynamic-slice" for i in users):
            total += sum(_hbm(i.result) for i in users)
        else:
            total += _hbm(parameter.result)
    return total + (0.0 if in_place else _hbm(instruction.result))


def _io(body: dict[str, Instruction], instruction: Instruction) -> float:
    return _hbm(instruction.result) + sum(_hbm(body[o].result) for o in instruction.operands if o in body)


def _hbm(result: str) -> float:
    return float(sum(a.padded_size for a in arrays(result) if a.in_hbm))


def _product_flops(body: dict[str, Instruction], instruction: Instruction) -> float:
    """Of a convolution, which is how XLA for TPU writes matrix products; batch dimensions appear as spatial ones."""
    output = arrays(instruction.result)[0]
    operands = [arrays(body[o].result)[0] for o in instruction.operands[:2] if o in body]
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    if len(operands) < 2 or not labels:
        return 0.0
    lhs, rhs = operands
    left, right, out = labels.groups()
    groups = re.search(r"feature_group_count=(\d+)", instruction.rest)
    batches = re.search(r"batch_group_count=(\d+)", instruction.rest)
    multiplied = rhs.shape[right.index("i")]
    flops = 2.0 * output.shape[out.index("b")] * output.shape[out.index("f")] * multiplied
    flops /= (int(batches[1]) if batches else 1) if not groups else 1
    for spatial in (letter for letter in left if letter.isdigit()):
        flops *= _pairs(instruction, int(spatial), lhs, output, left.index(spatial), out.index(spatial))
    return flops


def _pairs(instruction: Instruction, spatial: int, lhs: Array, output: Array, place: int, out_place: int) -> int:
    """Pairs of an output and an input position along a spatial dimension that are multiplied; padding is not."""

    def window(name: str, default: str) -> str:
        found = re.search(rf"window={{[^}}]*\b{name}=([^ }}]+)", instruction.rest)
        return found[1].split("x")[spatial] if found else default

    size, stride, dilate, base = (int(window(n, "1")) for n in ("size", "stride", "rhs_dilate", "lhs_dilate"))
    low = int(window("pad", "0_0").split("_")[0])
    position = np.arange(output.shape[out_place])[:, None] * stride + np.arange(size) * dilate - low
    inside = (position >= 0) & (position < (lhs.shape[place] - 1) * base + 1) & (position % base == 0)
    return int(inside.sum())
