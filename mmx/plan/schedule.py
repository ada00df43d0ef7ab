"""How long a compiled TPU program takes, predicted: its schedule played through with the compiler's cycle counts.

Every instruction takes the cycles that the compiler estimates for it, or where its bytes need longer, its time in HBM;
kernels take the cycles that were counted for them and kept (``kernels.py``), or their FLOPs at the chip's peak. A
synchronous collective stops everything for its time on the links. An asynchronous one occupies the links, one after
another, from its start, and what is left of it at its done is waited for. Loops turn as often as the program says;
those whose turns the documents decide as often as for one document a row.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable

from mmx.plan.collectives import Collective, collective_of
from mmx.plan.hlo import Instruction, Program
from mmx.plan.links import Torus
from mmx.plan.work import Kernel, Work, kernel, part, work
from pallas_kernels.aot.chips import Chip

_BRANCHES = ("true_computation", "false_computation", "branch_computations")


@dataclasses.dataclass
class PartTime:
    """Of one part of the model, in one step."""

    busy: float = 0.0  # seconds that the core works
    work: Work = dataclasses.field(default_factory=Work)
    links: float = 0.0  # seconds that its messages occupy links
    waiting: float = 0.0  # seconds of those in which the core does nothing else


@dataclasses.dataclass
class Traffic:
    """Collectives of one kind over one set of mesh axes, in one step."""

    times: float = 0.0
    bytes: float = 0.0  # left on a device
    seconds: float = 0.0
    waiting: float = 0.0
    overlapped: float = 0.0  # how many of ``times`` are asynchronous with work beside them


@dataclasses.dataclass
class KernelTime:
    """Calls of one Pallas kernel in one step."""

    times: float = 0.0
    seconds: float = 0.0


@dataclasses.dataclass
class Schedule:
    """A step."""

    seconds: float
    parts: dict[str, PartTime]
    kernels: dict[str, KernelTime]
    traffic: dict[tuple[str, tuple[str, ...], str], Traffic]  # by kind, mesh axes and the links that they cross

    @property
    def work(self) -> Work:
        """Of all parts."""
        return sum((p.work for p in self.parts.values()), Work())

    @property
    def link_seconds(self) -> float:
        """Of all parts."""
        return sum(p.links for p in self.parts.values())


def play(
    program: Program, chip: Chip, torus: Torus, kernel_seconds: Callable[[Kernel], float], open_turns: float
) -> Schedule:
    """Plays a program through.

    Args:
      torus: where its devices are.
      kernel_seconds: time of a Pallas kernel's call.
      open_turns: turns of a loop whose number the data decide.
    """
    return _Player(program, chip, torus, kernel_seconds, open_turns).play()


class _Player:
    def __init__(self, program, chip, torus, kernel_seconds, open_turns):
        self.program, self.chip, self.torus = program, chip, torus
        self.kernel_seconds, self.open_turns = kernel_seconds, open_turns
        self.lengths: dict[str, float] = {}
        self.parts: dict[str, PartTime] = collections.defaultdict(PartTime)
        self.kernels: dict[str, KernelTime] = collections.defaultdict(KernelTime)
        self.traffic: dict[tuple, Traffic] = collections.defaultdict(Traffic)

    def play(self) -> Schedule:
        seconds = self._body(self.program.entry, 1.0)
        return Schedule(seconds, dict(self.parts), dict(self.kernels), dict(self.traffic))

    def _body(self, name: str, times: float) -> float:
        """Seconds of one run of a computation, of which there are ``times``."""
        clock, links_free, busy = 0.0, 0.0, 0.0
        under_way: dict[str, tuple[float, float, str, Traffic]] = {}
        body = self.program.body(name)
        names = {i.name: i for i in body}
        for instruction in body:
            if instruction.operation == "while":
                turns = self.program.turns(instruction)
                turns = self.open_turns if turns is None else turns
                spent = turns * self._body(instruction.called("body")[0], times * turns)
                clock, busy = clock + spent, busy + spent
            elif instruction.operation == "call":
                spent = sum(self._body(called, times) for called in instruction.called("to_apply"))
                clock, busy = clock + spent, busy + spent
            elif instruction.operation == "conditional":
                # Branches are work and no work: the sum is the one that works.
                spent = sum(self._body(called, times) for called in instruction.called(*_BRANCHES))
                clock, busy = clock + spent, busy + spent
            elif collective := collective_of(self.program, instruction):
                owner, traffic, seconds = self._collective(instruction, collective, times)
                begin = max(clock, links_free)
                links_free = begin + seconds
                if collective.is_async:
                    under_way[instruction.name] = (links_free, busy, owner, traffic)
                else:
                    self._wait(owner, traffic, links_free - clock, times)
                    clock = links_free
            elif done := next((under_way.pop(o) for o in instruction.operands if o in under_way), None):
                finish, busy_then, owner, traffic = done
                traffic.overlapped += times * (busy > busy_then)
                self._wait(owner, traffic, max(0.0, finish - clock), times)
                clock = max(clock, finish)
            else:
                spent = self._work(names, instruction, times)
                clock, busy = clock + spent, busy + spent
        return clock

    def _collective(self, instruction: Instruction, collective: Collective, times: float) -> tuple[str, Traffic, float]:
        owner, seconds = part(self.program, instruction), self.torus.seconds(collective)
        members = collective.group or range(len(self.torus._coordinates))
        key = (collective.kind, self.torus.mesh_axes(members), self.torus.route(collective).crosses)
        traffic = self.traffic[key]
        traffic.times += times
        traffic.bytes += times * collective.size
        traffic.seconds += times * seconds
        self.parts[owner].links += times * seconds
        return owner, traffic, seconds

    def _wait(self, owner: str, traffic: Traffic, seconds: float, times: float) -> None:
        traffic.waiting += times * seconds
        self.parts[owner].waiting += times * seconds

    def _work(self, names: dict[str, Instruction], instruction: Instruction, times: float) -> float:
        done = work(self.program, names, instruction)
        if not (done.flops or done.bytes):
            return 0.0
        call = kernel(self.program, names, instruction) if instruction.operation == "custom-call" else None
        seconds = self.kernel_seconds(call) if call else (instruction.cycles or 0) / self.chip.clock
        seconds = max(seconds, self.chip.memory_seconds(done.bytes) if instruction.cycles is None else 0.0)
        record = self.parts[part(self.program, instruction)]
        record.busy += times * seconds
        record.work += Work(times * done.flops, times * done.bytes)
        if call:
            self.kernels[call.name].times += times
            self.kernels[call.name].seconds += times * seconds
        return seconds
