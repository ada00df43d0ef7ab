"""Stages: what each sets, how their mixtures pass into each other, and the report's three."""

import dataclasses

import pytest

from configs.long_context import TABLE_6, get_config
from mmx.config import ConfigError, DataConfig, MeshConfig, Phase, Run, Stage, TrainConfig, from_dict, to_dict


def weights(entries) -> dict[str, float]:
    return {name: float(weight) for name, weight in (entry.split("=") for entry in entries)}


def two(**changes) -> tuple[Stage, ...]:
    """1,000 rows of one mixture, then 1,000 of another."""
    first = Stage("first", steps=250, batch_size=4, mixture=("a=1", "b=3"))
    second = Stage("second", tokens=1000 * 512, batch_size=4, mixture=("b=1", "c=1"))
    return first, dataclasses.replace(second, **changes)


def points(stages, index=1, before=()):
    run = Run(data=DataConfig(mixture=before), train=TrainConfig(steps=0), stages=stages)
    run.validate()
    return [(point.row, weights(point.weights)) for point in run.of_stage(index).data.mixture_points]


def test_a_stage_takes_the_place_of_the_branches():
    stage = Stage(
        "s", steps=3, sequence_length=64, batch_size=2, rope_base=7e4, micro_batches=2, mixture=("a=2", "b=2")
    )
    run = Run(stages=(stage,), train=TrainConfig(steps=0, log_every=3))
    run.validate()
    alone = run.of_stage(0)
    assert (alone.model.rope_base, alone.data.sequence_length, alone.data.batch_size) == (7e4, 64, 2)
    assert (alone.train.steps, alone.train.micro_batches, alone.train.log_every) == (3, 2, 3)
    assert alone.data.mixture == ("a=0.5", "b=0.5")
    assert not alone.stages
    assert not alone.data.mixture_points
    assert Run().of_stage(0) == Run()
    assert from_dict(to_dict(run)) == run


def test_rates_start_where_the_stage_before_ended():
    first, second = two(schedule=(Phase("exponential", 0.1, steps=10), Phase("constant", 0.1)))
    run = Run(stages=(dataclasses.replace(first, schedule=(Phase("linear", 0.7, steps=9),)), second))
    assert [run.of_stage(index).optimizer.start_level for index in (0, 1)] == [0.0, 0.7]
    dataclasses.replace(run, train=TrainConfig(steps=0)).validate()


def test_transition_and_late_mixture():
    own = {"b": 0.5, "c": 0.5}
    late = {"b": 0.4, "c": 0.4, "qa": 0.2}
    stages = two(transition=0.1, late_mixture=("qa=5",), late_rows=0.3, late_share=0.2)
    assert points(stages) == [(0, {"a": 0.25, "b": 0.75}), (100, own), (699, own), (700, pytest.approx(late))]
    # A stage after that starts from its end, the late part included.
    stages = (dataclasses.replace(stages[1], name="zeroth"), dataclasses.replace(stages[0], transition=0.5))
    assert points(stages) == [(0, pytest.approx(late)), (500, {"a": 0.25, "b": 0.75})]


def test_first_stage_moves_from_what_was_read_before():
    stages = (dataclasses.replace(two()[0], transition=0.2),)
    assert points(stages, 0, before=("x=9",)) == [(0, {"x": 1.0}), (200, {"a": 0.25, "b": 0.75})]
    assert points(stages, 0) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 0}, r"stages\[1\] \(second\): needs either tokens or steps"),
        ({"steps": 5}, "needs either tokens or steps"),
        ({"name": "first"}, "two stages share a name"),
        ({"name": ""}, "name is empty"),
        ({"sequence_length": 1}, "sequence_length must be at least 2"),
        ({"schedule": ()}, "schedule is empty"),
        ({"transition": 1.5}, "transition=1.5 is a share"),
        ({"transition": 0.9, "late_mixture": ("qa=1",)}, "overlap"),
        ({"mixture": (), "late_mixture": ("qa=1",)}, "nothing to mix with"),
        ({"mixture": ("a",)}, "must read source=weight"),
        ({"mixture": ("a=-1",)}, "must be greater than 0"),
        ({"mesh": MeshConfig(fsdp=3)}, r"stages\[1\] \(second\): the mesh has fsdp 3"),
        ({"batch_marks": (2.0, 2.5)}, "must fall"),
        ({"micro_batches": 3}, "cannot be split over train.micro_batches = 3"),
    ],
)
def test_mistakes_are_one_sentence(changes, message):
    with pytest.raises(ConfigError, match=message):
        Run(train=TrainConfig(steps=0), stages=two(**changes)).validate()


def test_what_stages_decide_is_not_set_beside_them():
    for train in (TrainConfig(tokens=5), TrainConfig(batch_marks=(1.0,))):
        with pytest.raises(ConfigError, match=r"train\.(tokens|batch_marks) is set and so are stages"):
            Run(train=train, stages=two()).validate()
    with pytest.raises(ConfigError, match=r"or give the run its length in train\.tokens"):
        Run(train=TrainConfig(steps=0)).validate()


def shares(run: Run, index: int) -> dict[str, float]:
    """Mean share of each bucket over the rows of a stage, question-answer samples included."""
    rows, found = run.stages[index].rows, run.of_stage(index).data.mixture_points
    total = dict.fromkeys(("short", "medium", "long"), 0.0)
    ends = [point.row for point in found[1:]] + [rows]
    for point, following, end in zip(found, (*found[1:], found[-1]), ends, strict=True):
        for entries in (point.weights, following.weights):
            for name, weight in weights(entries).items():
                total[name.split("/")[1]] += weight / 2 * (end - point.row) / rows
    return total


@pytest.mark.parametrize("variant", ["", "miniature"])
def test_table_6(variant):
    run = get_config(variant)
    run.validate(1 if variant else 1024)
    factor = 64 if variant else 1
    assert [stage.sequence_length * factor for stage in run.stages] == [2**17, 2**19, 2**20]
    assert [stage.rope_base for stage in run.stages] == [5e6, 10e6, 10e6]
    assert [stage.tokens * (250_000 if variant else 1) for stage in run.stages] == [300e9, 32e9, 26e9]
    for index, stage in enumerate(run.stages):
        for share, wanted in zip(shares(run, index).values(), TABLE_6[stage.name], strict=True):
            assert share == pytest.approx(wanted / 100, abs=0.01)
        last = weights(run.of_stage(index).data.mixture_points[-1].weights)
        assert sum(weight for name, weight in last.items() if "_qa/" in name) == pytest.approx(0.1)


def test_gentle_variant():
    run = get_config("gentle")
    run.validate(1024)
    assert [stage.name for stage in run.stages] == ["32K", "128K", "512K", "1M"]
    assert sum(stage.tokens for stage in run.stages) == 358e9
    with pytest.raises(ConfigError, match="no variant"):
        get_config("nonsense")
