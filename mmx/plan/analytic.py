"""A training step counted on paper: FLOPs, bytes and messages of each part of the model on one device.

The same for TPUs and GPUs, without compiling. Parts follow one another, and each takes as long as its FLOPs at the peak
or its bytes at full bandwidth. Tokens travel to experts beside the experts' work on others; weights are waited for, as
in the schedules that the compiler makes of our steps. No kernel reaches the peak of a chip: a step takes longer.
"""

from __future__ import annotations

import dataclasses
import math

from mmx.config import LIGHTNING, Run, count_parameters, forward_flops
from mmx.plan.machine import Machine
from mmx.plan.work import Work

EXCHANGE = "routing and exchange"
# Passes over the weights and activations: forward and backward twice as dear; again forward where it is recomputed.
_PASSES = {"none": 3, "selective": 4, "offload": 4, "full": 4}


@dataclasses.dataclass
class PartCount:
    """Of one part of the model, one device and one step."""

    work: Work
    links: float = 0.0  # seconds of its messages

    def computing(self, machine: Machine) -> float:
        """Seconds without its messages."""
        return max(self.work.flops / machine.part.flops, self.work.bytes / machine.part.bandwidth)

    def by_resource(self, machine: Machine) -> dict[str, float]:
        """Seconds that each resource needs."""
        return {
            "matrix units": self.work.flops / machine.part.flops,
            "HBM": self.work.bytes / machine.part.bandwidth,
            "links": self.links,
        }


def count_step(run: Run, machine: Machine) -> dict[str, PartCount]:
    """Parts by the names that the compiled half of a report has. Rows are one document each."""
    model, sizes, devices = run.model, run.mesh.sizes(machine.devices), machine.devices
    passes, width = _PASSES[model.remat], {"float32": 4, "bfloat16": 2}[model.dtype]
    # Kept results of attention spare its second forward pass, not that of its projections.
    mixing_passes = passes if model.remat == "full" else 3
    tokens = run.data.batch_size * run.data.sequence_length / devices
    flops = forward_flops(model, [run.data.sequence_length] * run.data.batch_size)
    lightning = sum(kind == LIGHTNING for kind in model.layer_pattern)
    softmax, layers = model.num_layers - lightning, model.num_layers
    D, K, H, G = model.hidden_size, model.head_dim, model.num_heads, model.num_kv_heads
    context, tensor, micro = sizes["context"], sizes["tensor"], run.train.micro_batches
    capacity = max(1.0, model.capacity_factor)

    def gathered(bytes_of_all: float, group: int, times: float) -> float:
        """Seconds of gathering weights for each pass and scattering their gradients."""
        if group == 1:
            return 0.0
        return times * bytes_of_all * (group - 1) / group / machine.gather_bandwidth(group)

    # Weights travel forward, again when recomputed, and their gradients back; once a micro-batch.
    travels = micro * (passes - 1)
    weight_group = sizes["fsdp"] * sizes["expert"] * sizes["expert_tensor"] * context
    expert_group = sizes["fsdp"] * context * tensor
    counts = count_parameters(model)
    activations = lambda channels: passes * tokens * channels * width  # noqa: E731
    per_token = tokens * width
    head_bytes = model.vocab_size * D / tensor * width
    heads_width = H * K
    # States of all slices (two a rank in the zigzag layout), fp32, of the device's rows and heads.
    rows_here = run.data.batch_size * context * tensor / devices
    lasp = (passes - 1) * lightning * rows_here * 2 * (context - 1) * H / tensor * K * K * 4
    # Keys and values in each pass, their gradients in fp32 backward: tensor times the tokens, one head in tensor.
    ring = softmax * tokens * 2 * G * K * (context - 1) * ((passes - 1) * width + 4)
    tensor_moves = 2 * passes * per_token * D * (tensor - 1) * layers

    def attention(kinds: int, parameters: int, mixing: float, channels: float, messages: float) -> PartCount:
        if not kinds:
            return PartCount(Work())
        work = Work(
            passes * 2 * tokens * parameters + mixing_passes * mixing / devices,
            kinds * activations(channels) + travels * parameters / tensor * width,
        )
        seconds = gathered(parameters / tensor * width, weight_group, travels)
        seconds += messages / machine.gather_bandwidth(max(2, context))
        seconds += tensor_moves * kinds / layers / machine.gather_bandwidth(tensor) if tensor > 1 else 0.0
        return PartCount(work, seconds)

    rows = tokens * model.experts_per_token * capacity
    exchanged = 2 * passes * rows * D * width * layers * (sizes["expert"] - 1) / sizes["expert"]
    scattered = 2 * passes * rows * D * width * layers * (sizes["expert_tensor"] - 1)
    local_experts = counts.experts / sizes["expert"] / sizes["expert_tensor"]
    parts = {
        "lightning attention": attention(
            lightning, counts.lightning_attention, flops.lightning_state, 2 * D + 6 * heads_width, lasp
        ),
        "softmax attention": attention(
            softmax, counts.softmax_attention, flops.softmax_scores, 2 * D + 2 * heads_width + 4 * G * K, ring
        ),
        "experts": PartCount(
            Work(
                passes * capacity * flops.experts / devices,
                layers * passes * rows * (2 * D + 3 * model.expert_hidden_size) * width
                + travels * local_experts * width,
            ),
            gathered(local_experts * width, expert_group, travels),
        ),
        EXCHANGE: PartCount(
            Work(passes * flops.router / devices, layers * activations(4 * D)),
            exchanged / machine.all_to_all_bandwidth(sizes["expert"])
            + (scattered / machine.gather_bandwidth(sizes["expert_tensor"]) if sizes["expert_tensor"] > 1 else 0.0),
        ),
        "head and loss": PartCount(
            Work(3 * flops.head / devices, 3 * head_bytes * micro + tokens * model.vocab_size / tensor * 4),
            gathered(head_bytes, weight_group, 4 * micro),
        ),
        "norms and residuals": PartCount(Work(0.0, layers * activations(6 * D))),
        # Parameters and two moments read and written, gradients read; all fp32.
        "optimizer": PartCount(Work(0.0, 7 * 4 * counts.total / _state_ways(sizes))),
    }
    return {name: part for name, part in parts.items() if part.work.flops or part.work.bytes}


def roofline_seconds(parts: dict[str, PartCount], machine: Machine) -> float:
    """A step's time if every part took that of its scarcest resource, and nothing but the exchange overlapped."""
    hidden = min(parts[EXCHANGE].links, parts["experts"].computing(machine))
    return math.fsum(part.computing(machine) + part.links for part in parts.values()) - hidden


def _state_ways(sizes: dict[str, int]) -> int:
    """Devices that share one copy of the state."""
    return math.prod(sizes.values()) // sizes["replica"]
