"""Tries meshes, batch sizes and what the backward pass keeps, and says why each of the others loses.

Everything is counted on paper first; what does not fit, or is slower on paper than the best few, is never compiled.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator

from mmx.config import ConfigError, Run
from mmx.plan.machine import Machine
from mmx.plan.report import LEAST_FREE, Plan, compiled_plan, counted_plan

REMATS = ("selective", "offload", "full")
# What the count on paper leaves out of memory, as a share of it: compiled steps have had a quarter more alive.
COUNT_MARGIN = 0.35


@dataclasses.dataclass
class Candidate:
    """One way to run, and why it is not the best."""

    plan: Plan
    reason: str = ""

    @property
    def name(self) -> str:
        """Its mesh, remat, batch and micro-batches."""
        run, mesh = self.plan.run, self.plan.mesh
        axes = " ".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "one device"
        micro = f" micro_batches={run.train.micro_batches}" if run.train.micro_batches > 1 else ""
        return f"{axes} remat={run.model.remat} batch_size={run.data.batch_size}{micro}"


def search(
    run: Run, machine: Machine, *, best: int = 5, compile_best: int = 0, say: Callable[[str], None] = lambda line: None
) -> tuple[list[Candidate], dict[str, int]]:
    """The best few ways to run, fastest a token first, and how many others lost for what reason.

    Args:
      run: gives the model, the length of rows and the largest batch; its mesh is not used.
      best: how many to return.
      compile_best: how many of them to compile, TPU only; their order is then that of the schedules.

    Raises:
      ConfigError: if nothing fits.
    """
    lost: dict[str, int] = {}
    found: list[Candidate] = []
    for tried in _ways(run, machine):
        try:
            plan = counted_plan(tried, machine)
        except ConfigError:
            continue  # Dimensions that do not divide.
        if plan.used * (1 + COUNT_MARGIN) > plan.memory_available * (1 - LEAST_FREE):
            lost["not enough memory, counted"] = lost.get("not enough memory, counted", 0) + 1
            continue
        found.append(Candidate(plan))
    if not found:
        raise ConfigError(
            f"no mesh of {machine.name} holds this run with {LEAST_FREE:.0%} of the memory free: take more devices or "
            "shorter rows"
        )
    found.sort(key=_seconds_per_token)
    kept = found[: max(best, compile_best)]
    lost["slower on paper"] = len(found) - len(kept)
    for candidate in kept[:compile_best] if machine.is_tpu else []:
        say(candidate.name)
        try:
            candidate.plan = compiled_plan(candidate.plan.run, machine, say)
        except ConfigError as error:
            candidate.reason = str(error).partition(":")[0]
    kept.sort(key=lambda c: (bool(c.reason), not c.plan.fits, c.plan.memory is None, _seconds_per_token(c)))
    for candidate in kept[1:]:
        candidate.reason = candidate.reason or _why(kept[0], candidate)
    return kept[:best], lost


def _ways(run: Run, machine: Machine) -> Iterator[Run]:
    devices, model = machine.devices, run.model
    powers = [2**n for n in range(devices.bit_length()) if devices % 2**n == 0]
    if devices not in powers:
        powers.append(devices)
    batches = sorted({run.data.batch_size // n for n in (1, 2, 4) if run.data.batch_size // n})
    most_tensor = model.num_kv_heads
    for expert, etp, context, tensor in itertools.product(powers, powers, powers, powers):
        if expert > model.num_experts or etp > 4 or tensor > most_tensor or devices % (expert * etp * context * tensor):
            continue
        fsdp = devices // (expert * etp * context * tensor)
        for batch, remat, micro in itertools.product(batches, REMATS, (1, 2, 4)):
            if batch % (fsdp * expert * etp * micro):
                continue
            tried = copy.deepcopy(run)
            mesh = tried.mesh
            mesh.replica, mesh.fsdp, mesh.expert = 1, fsdp, expert
            mesh.expert_tensor, mesh.context, mesh.tensor = etp, context, tensor
            tried.data.batch_size, tried.model.remat, tried.train.micro_batches = batch, remat, micro
            yield tried


def _seconds_per_token(candidate: Candidate) -> float:
    return candidate.plan.step_seconds / candidate.plan.tokens


def _why(winner: Candidate, loser: Candidate) -> str:
    """What the loser needs more of, by part and resource."""
    ours, theirs = winner.plan, loser.plan
    if not theirs.fits:
        return f"{theirs.free:.0%} of the memory free"
    slower = _seconds_per_token(loser) / _seconds_per_token(winner) - 1
    pairs = (theirs.parts, ours.parts) if theirs.parts and ours.parts else (theirs.counted, ours.counted)
    more = {}
    for name, part in pairs[0].items():
        other = pairs[1].get(name)
        for field, what in (("compute", f"in {name}"), ("waiting", f"waiting for the messages of {name}")):
            more[what] = getattr(part, field) / theirs.tokens - (getattr(other, field) / ours.tokens if other else 0.0)
    if slower < 5e-4:
        return "as fast; " + (f"{theirs.used / 2**30:.0f} GiB where the first needs {ours.used / 2**30:.0f}")
    return f"{slower:.1%} slower, most of it {max(more, key=more.get)}"


def lines(found: list[Candidate], lost: dict[str, int]) -> list[str]:
    """The result as text."""
    text = []
    for place, candidate in enumerate(found, 1):
        plan = candidate.plan
        how = "compiled" if plan.memory else "counted"
        text.append(
            f"{place}. {candidate.name}\n   {how}: {plan.step_seconds:.2f} s a step, predicted MFU "
            f"{plan.predicted_mfu:.1%}, {plan.used / 2**30:.1f} GiB, {plan.free:.0%} free"
            + (f"; loses: {candidate.reason}" if candidate.reason else "; the best")
        )
    text.append("Not shown: " + ", ".join(f"{count:,} {reason}" for reason, count in lost.items() if count))
    return text
