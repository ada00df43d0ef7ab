"""A plan as a page of text."""

from __future__ import annotations

from mmx.plan import calibration
from mmx.plan.memory import GiB, Memory
from mmx.plan.report import DAY, LEAST_FREE, Part, Plan

_MEMORY = {
    "parameters": "parameters",
    "optimizer": "optimizer state",
    "batch": "batch and arguments' tiles",
    "saved_activations": "activations kept for backward",
    "gradients": "gradients",
    "parameter_copies": "parameters in the compute dtype",
    "cache": "states, keys and values",
    "working": "temporaries",
}


def page(plan: Plan) -> str:
    """The page, without a line break at its end."""
    sections = [_head(plan), _memory(plan), _parts(plan), _kernels(plan), _messages(plan), _time(plan), _honesty(plan)]
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def _head(plan: Plan) -> list[str]:
    model, data, machine = plan.run.model, plan.run.data, plan.machine
    kind = f"{machine.chips:,} chips" + (f", {machine.cores:,} TensorCores" if machine.cores != machine.chips else "")
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    micro = plan.run.train.micro_batches
    what = {
        "train": f"a step of {data.batch_size:,} rows of {data.sequence_length:,} tokens, {plan.tokens / 1e6:,.1f}M in "
        f"all; remat {model.remat}" + (f"; {micro} micro-batches" if micro > 1 else ""),
        "prefill": f"prefill of {data.batch_size:,} prompts of {data.sequence_length:,} tokens",
        "decode": f"one token of {data.batch_size:,} rows after {data.sequence_length - 1:,} tokens",
    }
    return [
        f"{plan.parameters:,} parameters on {machine.name}: {kind if machine.is_tpu else f'{machine.chips:,} GPUs'}",
        f"{what[plan.work]}; mesh {mesh}",
        f"compiled by {plan.compiler} in {plan.compile_seconds:.0f} s"
        if plan.compiler
        else "NOT COMPILED: every figure below is a count on paper",
        _verdict(plan),
    ]


def _verdict(plan: Plan) -> str:
    used, available = plan.used / GiB, plan.memory_available / GiB
    if plan.fits:
        return f"It fits: {used:.1f} of {available:.1f} GiB, {plan.free:.0%} free."
    if plan.free >= 0:
        return f"Too tight: {used:.1f} of {available:.1f} GiB, {plan.free:.0%} free where {LEAST_FREE:.0%} are wanted."
    return f"It does not fit: {used:.1f} of {available:.1f} GiB."


def _memory(plan: Plan) -> list[str]:
    lines = [f"Memory of a device, GiB{'':22}{'compiled':>10}{'counted':>10}"]
    for name, title in _MEMORY.items():
        if not any(getattr(m, name) for m in (plan.memory, plan.memory_counted) if m):
            continue
        lines.append(f"  {title:42}{_gib(plan.memory, name):>10}{_gib(plan.memory_counted, name):>10}")
    totals = (f"{m.total / GiB:.2f}" if m else "" for m in (plan.memory, plan.memory_counted))
    lines.append(f"  {'total':42}" + "".join(f"{total:>10}" for total in totals))
    if plan.memory_counted.host or (plan.memory and plan.memory.host):
        lines.append(
            f"  {'in the memory of the host':42}{_gib(plan.memory, 'host'):>10}{_gib(plan.memory_counted, 'host'):>10}"
        )
    if plan.memory:
        lines += _difference(plan)
        lines.append("  largest arrays:")
        lines += [
            f"    {b.size / GiB:6.2f}  {b.type}, {b.where}"
            + (f"; {b.padding / GiB:.2f} of it padding" if b.padding > 0.1 * b.size else "")
            for b in plan.buffers
        ]
    return lines


def _difference(plan: Plan) -> list[str]:
    lines = [
        "  The compiled total is the compiler's sum of buffers, some of which share their place: an upper bound.",
        f"  At the fullest moment {plan.peak_live / GiB:.1f} GiB are alive. The count knows no copies of its.",
    ]
    if plan.padding and plan.padding > 0.01 * plan.memory.total:
        lines.append(
            f"  {plan.padding / GiB:.1f} GiB of gradients and copies are padding: a tile is 128 numbers wide, "
            "their last dimension is not."
        )
    return lines


def _gib(memory: Memory | None, name: str) -> str:
    return "" if memory is None else f"{getattr(memory, name) / GiB:.2f}"


def _parts(plan: Plan) -> list[str]:
    header = f"{'':24}{'compute':>9}{'at peak':>9}{'HBM':>9}{'links':>9}{'waiting':>9}   limited by"
    rows = lambda parts: [_part(name, p) for name, p in parts.items() if p.compute + p.waiting > 5e-5]  # noqa: E731
    if plan.parts:
        return ["A step of a device, seconds, from the schedule", header, *rows(plan.parts)]
    return ["A step of a device, seconds, counted", header, *rows(plan.counted)]


def _part(name: str, part: Part) -> str:
    columns = (part.compute, part.matrix_units, part.hbm, part.links, part.waiting)
    return f"  {name:22}" + "".join(f"{value:9.3f}" for value in columns) + f"   {part.limit}"


def _kernels(plan: Plan) -> list[str]:
    if not plan.kernels:
        return []
    return [
        f"{'Pallas kernels':42}{'calls':>9}{'seconds':>10}{'of the step':>13}",
        *(f"  {k.name:40}{k.times:9,}{k.seconds:10.4f}{k.share:13.2%}" for k in plan.kernels),
    ]


def _messages(plan: Plan) -> list[str]:
    if not plan.messages:
        return []
    lines = [
        "What a device receives in a step",
        f"  {'collective':20}{'along':22}{'times':>7}{'GB':>8}{'s':>8}{'waits':>8}{'overlaps':>9}  crosses",
    ]
    for m in plan.messages:
        if m.bytes > 1e7:
            lines.append(
                f"  {m.kind:20}{m.axes:22}{m.times:7,}{m.bytes / 1e9:8.1f}{m.seconds:8.3f}{m.waiting:8.3f}"
                f"{m.overlapped:9.0%}  {m.crosses}"
            )
    return lines


def _time(plan: Plan) -> list[str]:
    machine, devices = plan.machine, plan.machine.devices
    lines = ["FLOPs of a device and step, TFLOP"]
    lines.append(f"  the model's (no recomputation)        {_amount(plan.model_flops / devices / 1e12):>12}")
    if plan.program_flops:
        lines.append(f"  the compiled program's, loops counted {_amount(plan.program_flops / 1e12):>12}")
        lines.append(f"  the compiler's, bodies counted once   {_amount(plan.compiler_flops / 1e12):>12}")
    seconds = plan.step_seconds
    rate, unit = plan.tokens / seconds, "chip" if machine.is_tpu else "GPU"
    counted = f"roofline of the counts {_duration(plan.counted_seconds)}"
    source = f"predicted from the schedule; {counted}" if plan.seconds else "counted; no program reaches it"
    lines += [
        "",
        f"Step time {_duration(seconds)} ({source})",
        f"Predicted MFU {plan.predicted_mfu:.1%}, {rate:,.0f} tokens/s, {_amount(rate * DAY / 1e9)}B tokens a day, "
        f"{_amount(rate / machine.chips)} tokens/s a {unit}",
    ]
    if plan.work != "train":
        return lines
    lines.append(
        f"The stage of {plan.steps:,} steps ({plan.steps * plan.tokens / 1e9:,.0f}B tokens): predicted "
        f"{plan.stage_days:,.1f} days, {plan.stage_days * 24 * machine.chips:,.0f} {unit}-hours"
    )
    return lines


def _amount(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"


def _honesty(plan: Plan) -> list[str]:
    if not plan.machine.is_tpu:
        return ["No step of ours on GPUs has been held against published ones: there is no honesty factor."]
    steps = calibration.honesty()
    if not steps:
        return ["No calibration yet: python -m launch.plan --calibrate"]
    return [
        f"Honesty factor {calibration.factor():.2f}: published over predicted MFU, for steps of ours in the shapes of",
        "models that MaxText trains on v5p. Nothing above is multiplied by it: ours recompute every layer, which",
        "bounds MFU by 75%, and theirs will recompute less.",
    ] + [
        f"  {s['name']:14} {s['topology']}: predicted MFU {s['predicted_mfu']:.1%}, MaxText published "
        f"{s['published_mfu']:.1%}, ratio {s['ratio']:.2f}"
        for s in steps
    ]
