"""Checkpoints: what is saved comes back, what is damaged is named and skipped, what does not fit is refused."""

import functools
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import serialization

from mmx.config import CheckpointConfig, ConfigError, MeshConfig, OptimizerConfig, to_dict
from mmx.parallel import build_mesh
from mmx.train.checkpoint import Checkpoints, Progress, load_params
from mmx.train.checksums import CHECKSUMS, WRITTEN_LATER, find_damage
from mmx.train.optimizer import build_optimizer
from mmx.train.step import TrainState, abstract_state, init_state
from tests.tiny import TINY, tiny

OPTIMIZER = build_optimizer(OptimizerConfig())


@pytest.fixture(scope="module")
def state() -> TrainState:
    return jax.jit(functools.partial(init_state, TINY, OPTIMIZER, 0))()


def progress(step: int) -> Progress:
    return Progress(step=step, tokens=100 * step, data={"global_next_index": 8 * step})


def layout(_: Progress) -> TrainState:
    return abstract_state(TINY, OPTIMIZER)


@pytest.fixture
def saved(tmp_path, state):
    """A folder with steps 1 and 2, whose skipped counters are 1 and 2."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", CheckpointConfig(keep=2), print)
    for step in (1, 2):
        checkpoints.save(TINY, state._replace(skipped=np.int32(step)), progress(step))
    checkpoints.close()
    return tmp_path / "checkpoints"


def open_again(folder, log=print) -> Checkpoints:
    return Checkpoints(folder, CheckpointConfig(keep=2), log)


def test_round_trip(saved, state):
    restored, where = open_again(saved).restore(TINY, layout)
    assert where == progress(2)
    assert restored.skipped == 2
    for a, b in zip(jax.tree.leaves(restored.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


def test_checkpoint_of_an_earlier_version(saved, state):
    """It has no checksums, no health in its state and no count of rollbacks."""
    values = serialization.to_state_dict(state._replace(skipped=np.int32(3)))
    del values["health"]
    with ocp.CheckpointManager(saved.absolute()) as manager:
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(values),
            progress=ocp.args.JsonSave({"step": 3, "tokens": 300, "data": {"global_next_index": 24}}),
            model=ocp.args.JsonSave(to_dict(TINY)),
        )
        manager.save(3, args=items)
    restored, where = open_again(saved).restore(TINY, layout)
    assert where == progress(3)
    assert restored.skipped == 3
    assert restored.health.bad_in_a_row == restored.health.average_loss == 0


def test_restores_onto_a_mesh(saved, state):
    with jax.set_mesh(build_mesh(MeshConfig(fsdp=2), jax.devices()[:2])):
        restored, _ = open_again(saved).restore(TINY, layout)
    for a, b in zip(jax.tree.leaves(restored.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(a, b)
    query = restored.params["runs"]["0_lightning"]["attention"]["query"]
    assert query.addressable_shards[0].data.size == query.size // 2


def test_full_disk_is_one_sentence_and_what_was_saved_stays(saved, state, monkeypatch):
    checkpoints = open_again(saved)
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    usage = shutil.disk_usage(saved)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size - 1))
    with pytest.raises(ConfigError, match=r"the disk is full: .*checkpoints has .* \(step 2 is the last"):
        checkpoints.save(TINY, state, progress(3))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size))
    checkpoints.save(TINY, state, progress(3))
    checkpoints.close()
    assert open_again(saved).restore(TINY, layout)[1] == progress(3)


def largest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize(
    "damage", ["truncated", "flipped", "removed", "no progress", "no checksums", "broken checksums"]
)
def test_damaged_checkpoint_is_named_and_skipped(saved, state, damage):
    victim = largest_file(saved / "2")
    if damage == "truncated":
        with victim.open("r+b") as file:
            file.truncate(victim.stat().st_size // 2)
    elif damage == "flipped":
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    elif damage == "broken checksums":
        (saved / "2" / CHECKSUMS).write_text('{"files": []}')
    elif damage == "no checksums":
        # As in a checkpoint of an earlier version: what Orbax cannot read is still set aside.
        (saved / "2" / CHECKSUMS).unlink()
        victim.unlink()
    elif damage == "removed":
        victim.unlink()
    else:
        (saved / "2" / "progress" / "metadata").write_text("{")
    said = []
    checkpoints = open_again(saved, said.append)
    restored, where = checkpoints.restore(TINY, layout)
    assert where == progress(1)
    assert restored.skipped == 1
    assert len(said) == 1
    assert str(saved / "2") in said[0]
    if damage in ("truncated", "flipped", "removed"):
        assert str(victim.relative_to(saved / "2")) in said[0]
    assert (saved.parent / "checkpoints-damaged" / "2").is_dir()
    # The step can be saved anew.
    checkpoints.save(TINY, state, progress(2))
    checkpoints.close()
    assert open_again(saved).latest == 2


def test_half_written_checkpoint_is_no_checkpoint(saved, state):
    # What a kill in the middle of a save leaves: Orbax's temporary folder.
    (saved / "3.orbax-checkpoint-tmp").mkdir()
    assert open_again(saved).restore(TINY, layout)[1] == progress(2)


def test_no_checkpoint(tmp_path, state):
    assert open_again(tmp_path / "none").restore(TINY, layout) is None


def test_every_single_byte_counts(saved):
    """One flipped bit in any file of a checkpoint is found and named."""
    left_out = (CHECKSUMS, *WRITTEN_LATER)
    files = [path for path in (saved / "2").rglob("*") if path.is_file() and path.name not in left_out]
    assert len(files) > 5
    assert find_damage(saved / "2") == []
    for number, path in enumerate(files):
        content = path.read_bytes()
        place = number * 7919 % len(content)
        path.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
        (phrase,) = find_damage(saved / "2")
        assert phrase.startswith(str(path.relative_to(saved / "2")))
        # Processes share the work: one of them sees it.
        assert [found for part in range(3) for found in find_damage(saved / "2", part, 3)] == [phrase]
        path.write_bytes(content)


def test_another_model_is_refused_with_all_that_differs(saved, state):
    other = tiny(num_experts=8, head_dim=16, rotary_dim=8)
    with pytest.raises(ConfigError, match=r"head_dim=8 and this run has 16, .*rotary_dim=4 .*num_experts=4 and"):
        open_again(saved).restore(other, layout)
    assert (saved / "2").is_dir()


def test_load_params(saved, state):
    config, params = load_params(saved)
    assert config == TINY
    jax.tree.map(np.testing.assert_array_equal, params, state.params)
    load_params(saved, 1)
    victim = largest_file(saved / "2")
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"2 is damaged: .* bytes instead of .*; there is .*checkpoints/1"):
        load_params(saved)
    with pytest.raises(ConfigError, match="no checkpoint of step 7"):
        load_params(saved, 7)
    with pytest.raises(ConfigError, match="no checkpoint"):
        load_params(saved.parent / "nothing")
