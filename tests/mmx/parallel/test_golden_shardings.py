"""How every parameter and the main activations of three recipes are split on three meshes, without any device.

``pytest --write-golden`` renews the table after an intended change, which then shows as a diff.
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from configs import minimax_text_01, quickstart, text_1b
from mmx.config import MeshConfig
from mmx.model.text import init_params, parameter_specs
from mmx.parallel import abstract_mesh, spec
from mmx.train.loss import Batch, loss_sums

GOLDEN = Path(__file__).parents[2] / "golden" / "shardings.json"
RECIPES = {"quickstart": quickstart, "text_1b": text_1b, "minimax_text_01": minimax_text_01}
MESHES = {
    "fsdp 8": {"fsdp": 8},
    "fsdp 2, expert 4, tensor 2": {"fsdp": 2, "expert": 4, "tensor": 2},
    "replica 2, expert 2, expert_tensor 2, context 2, tensor 2": {
        **{"replica": 2, "expert": 2, "expert_tensor": 2, "context": 2, "tensor": 2}
    },
}


def written(sharding_spec) -> str:
    """A partition spec, dimension by dimension: axes joined by +, - for a dimension that is not split."""
    entries = [entry if isinstance(entry, tuple) else (entry,) for entry in sharding_spec]
    return " ".join("+".join(axis for axis in entry if axis) or "-" for entry in entries)


def activations(jaxpr) -> set[str]:
    """Results of products and islands, and what the rematerialisation policies know by name."""
    found = set()
    for equation in jaxpr.eqns:
        kind = equation.primitive.name
        if kind in ("dot_general", "shard_map", "name"):
            label = equation.params["name"] if kind == "name" else kind
            for variable in equation.outvars:
                shape = ",".join(map(str, variable.aval.shape))
                split = written(variable.aval.sharding.spec)
                found.add(f"{label} {variable.aval.dtype}[{shape}] {split}".rstrip())
        if kind == "shard_map":
            continue  # Inside, everything is local.
        for parameter in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "jaxpr")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                found |= activations(inner)
    return found


def table(recipe, sizes) -> dict[str, list[str]]:
    run = recipe.get_config()
    config, micro = run.model, run.train.micro_batches
    devices = 1
    for size in sizes.values():
        devices *= size
    run.mesh = MeshConfig(**sizes)
    run.validate(devices)
    mesh = abstract_mesh(run.mesh, devices)
    with jax.sharding.use_abstract_mesh(mesh):
        specs = parameter_specs(config)
        params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
        shape = run.data.batch_size // micro, run.data.sequence_length
        sharding = NamedSharding(mesh, spec("batch", "attention_sequence"))
        whole = functools.partial(jax.ShapeDtypeStruct, shape, sharding=sharding)
        batch = Batch(*[whole(jnp.int32)] * 4, whole(jnp.float32))
        traced = jax.make_jaxpr(lambda p, b: loss_sums(config, p, b, dropless=False))(params, batch)
    flat = jax.tree.leaves_with_path(specs, is_leaf=lambda s: isinstance(s, jax.P))
    names = {"/".join(str(key.key) for key in path): written(s) for path, s in flat}
    shapes = {"/".join(str(key.key) for key in path): x for path, x in jax.tree.leaves_with_path(params)}
    assert names.keys() == shapes.keys()
    assert all(written(shapes[name].sharding.spec) == split for name, split in names.items())
    return {
        "parameters": [f"{name} {list(shapes[name].shape)} {split}" for name, split in sorted(names.items())],
        "activations": sorted(activations(traced.jaxpr)),
    }


@pytest.mark.parametrize("recipe", RECIPES)
def test_shardings_are_the_golden_ones(recipe, write_golden):
    got = {mesh: table(RECIPES[recipe], sizes) for mesh, sizes in MESHES.items()}
    known = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if write_golden:
        GOLDEN.write_text(json.dumps(known | {recipe: got}, indent=1, sort_keys=True) + "\n")
    else:
        assert got == known[recipe]
