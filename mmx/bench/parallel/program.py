"""What a traced program communicates, counted from its equations: nothing is run or compiled."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

COLLECTIVES = ("all_gather", "ppermute", "psum", "reduce_scatter", "all_to_all")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective equation over all ranks."""

    kind: str
    dtype: str
    result_bytes: int  # on one rank
    received_bytes: float  # what a rank gets from others, on average over the ranks
    times: int  # how often loops run it


@dataclasses.dataclass(frozen=True)
class Communication:
    """What the ranks exchange."""

    collectives: tuple[Collective, ...]
    serial_steps: int  # the longest chain of collectives each of which needs the result of the one before

    @property
    def received_bytes(self) -> float:
        """By one rank, on average over the ranks."""
        return sum(c.received_bytes * c.times for c in self.collectives)


def communication(function: Callable, ranks: int, *arguments: Any) -> Communication:
    """Of one call of ``function``, whose collectives are all over one axis of ``ranks`` devices.

    Arguments may be ``jax.ShapeDtypeStruct``.
    """
    closed = jax.make_jaxpr(function)(*arguments)
    found: list[Collective] = []
    _collect(closed.jaxpr, ranks, 1, found)
    depths = _depths(closed.jaxpr, [0] * len(closed.jaxpr.invars))
    return Communication(tuple(found), max(depths, default=0))


def _kind(equation: Any) -> str | None:
    # Some primitives carry the state of the type system in their names, as in psum_invariant.
    name = equation.primitive.name
    return next((kind for kind in COLLECTIVES if name == kind or name.startswith(f"{kind}_")), None)


def _bodies(equation: Any) -> list[Jaxpr]:
    leaves = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: isinstance(x, ClosedJaxpr | Jaxpr))
    return [leaf.jaxpr if isinstance(leaf, ClosedJaxpr) else leaf for leaf in leaves if _is_body(leaf)]


def _is_body(x: Any) -> bool:
    return isinstance(x, ClosedJaxpr | Jaxpr)


def _collect(jaxpr: Jaxpr, ranks: int, times: int, found: list[Collective]) -> None:
    for equation in jaxpr.eqns:
        kind = _kind(equation)
        for variable in equation.outvars if kind else ():
            shape, dtype = variable.aval.shape, variable.aval.dtype
            size = math.prod(shape) * dtype.itemsize
            found.append(Collective(kind, str(dtype), size, size * _share(kind, equation, ranks), times))
        inner = times * equation.params["length"] if equation.primitive.name == "scan" else times
        for body in _bodies(equation):
            _collect(body, ranks, inner, found)


def _share(kind: str, equation: Any, ranks: int) -> float:
    """Bytes that a rank receives over those of its result, on average."""
    if kind == "ppermute":
        return sum(giver != taker for giver, taker in equation.params["perm"]) / ranks
    # A ring's all-reduce is a reduce-scatter, which sends as much as P - 1 of its results, and an all-gather.
    return {"psum": 2 * (ranks - 1) / ranks, "reduce_scatter": ranks - 1}.get(kind, (ranks - 1) / ranks)


def _depths(jaxpr: Jaxpr, inputs: Sequence[int]) -> list[int]:
    """Collectives on the longest chain up to each output, given those up to each input."""
    depth = dict(zip(jaxpr.invars, inputs, strict=True))
    of = lambda variable: 0 if isinstance(variable, Literal) else depth.get(variable, 0)  # noqa: E731
    for equation in jaxpr.eqns:
        given = [of(variable) for variable in equation.invars]
        outputs = _equation_depths(equation, given)
        depth.update(zip(equation.outvars, outputs, strict=True))
    return [of(variable) for variable in jaxpr.outvars]


def _equation_depths(equation: Any, given: list[int]) -> list[int]:
    everything = [max(given, default=0)] * len(equation.outvars)
    bodies = _bodies(equation)
    if _kind(equation):
        return [depth + 1 for depth in everything]
    if equation.primitive.name == "scan":
        return _scan_depths(equation, bodies[0], given)
    if equation.primitive.name == "cond":
        branches = [_depths(body, given[1:]) for body in bodies]
        return [max(given[0], *outputs) for outputs in zip(*branches, strict=True)]
    if equation.primitive.name != "while" and len(bodies) == 1 and len(bodies[0].invars) == len(given):
        return _depths(bodies[0], given)
    if any(_communicates(body) for body in bodies):
        raise NotImplementedError(f"collectives inside {equation.primitive.name}")
    return everything


def _scan_depths(equation: Any, body: Jaxpr, given: list[int]) -> list[int]:
    # Constants, then the carry, then what is cut into steps, which has a dimension more outside than in the body; the
    # names of these numbers differ between JAX versions.
    ranks = lambda variables: [len(variable.aval.shape) for variable in variables]  # noqa: E731
    carried = sum(a == b for a, b in zip(ranks(equation.outvars), ranks(body.outvars), strict=True))
    constants = sum(a == b for a, b in zip(ranks(equation.invars), ranks(body.invars), strict=True)) - carried
    carry, results = given[constants : constants + carried], [0] * (len(equation.outvars) - carried)
    for _ in range(equation.params["length"]):
        out = _depths(body, [*given[:constants], *carry, *given[constants + carried :]])
        carry, results = out[:carried], [max(pair) for pair in zip(results, out[carried:], strict=True)]
    return [*carry, *results]


def _communicates(jaxpr: Jaxpr) -> bool:
    return any(_kind(equation) or any(map(_communicates, _bodies(equation))) for equation in jaxpr.eqns)
