"""What may be asked for, and what is refused before gcloud hears of it."""

import re

import pytest

from mmx.config import ConfigError
from mmx.pod.accelerators import families, find_accelerator
from mmx.pod.record import Launch, Record
from mmx.pod.request import PodRequest

GOOD = {"name": "moe", "zone": "us-east5-a", "accelerator_type": "v5p-1024"}


@pytest.mark.parametrize(
    ("accelerator_type", "chips", "hosts"),
    [
        ("v4-8", 4, 1),
        ("v5p-8", 4, 1),
        ("v5p-32", 16, 4),
        ("v5p-384", 192, 48),
        ("v5p-12288", 6144, 1536),
        ("v5litepod-8", 8, 1),
        ("v5litepod-16", 16, 4),
        ("v6e-256", 256, 64),
    ],
)
def test_sizes(accelerator_type, chips, hosts):
    accelerator = find_accelerator(accelerator_type)
    assert (accelerator.chips, accelerator.hosts) == (chips, hosts)


def test_every_generation_has_a_runtime_of_its_own():
    versions = [family.runtime_version for family in families().values()]
    assert len(set(versions)) == len(versions)
    for name, family in families().items():
        request = PodRequest("moe", family.zones[0], f"{family.spelling}{family.small[-1]}")
        assert request.runtime_version == family.runtime_version, name
        assert request.zone_is_documented
        assert request.runtime_is_documented


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"name": "Moe"}, "name 'Moe': use lower-case letters"),
        ({"name": "moe-"}, "no dash last"),
        ({"name": "m" * 62}, "at most 61 characters"),
        ({"zone": "us-east5"}, "write a zone such as us-east5-a"),
        ({"zone": "mars"}, "write a zone such as us-east5-a"),
        ({"project": "My Project"}, "is no project ID"),
        (
            {"accelerator_type": "v5p-100"},
            "v5p counts cores and has v5p-8, v5p-16, v5p-32, v5p-64 and multiples of 128",
        ),
        ({"accelerator_type": "v5e-16"}, "v5e is spelt 'v5litepod-N'"),
        ({"accelerator_type": "v5lite-16"}, "did you mean 'v5litepod'?"),
        ({"accelerator_type": "tpu7x-128"}, "rented through GKE alone"),
        ({"accelerator_type": "v5p"}, "is not known"),
        ({"runtime_version": "v2-alpha-tpuv6e"}, "is for v6e: v5p takes 'v2-alpha-tpuv5'"),
        ({"slices": 0}, "at least 1"),
        ({"capacity": "cheap"}, "one of on-demand, spot, reserved"),
    ],
)
def test_mistakes(fields, sentence):
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        PodRequest(**(GOOD | fields))


def test_nodes_have_the_names_that_gcloud_gives_them():
    assert PodRequest(**GOOD).node(0) == "moe"
    assert PodRequest(**GOOD, slices=2).node(1) == "moe-1"
    with pytest.raises(ConfigError, match="slice 2: moe has 2, counted from 0"):
        PodRequest(**GOOD, slices=2).node(2)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"arguments": ("--workdir=runs/moe",)}, "an absolute path that every host sees"),
        ({"environment": ("DEBUG",)}, "write NAME=VALUE"),
        ({"logs": "/tmp/logs"}, "a folder of a bucket"),
    ],
)
def test_launches_that_cannot_work(fields, sentence):
    with pytest.raises(ConfigError, match=sentence):
        Launch("pretrain", **({"arguments": ()} | fields))


def test_record_remembers_and_refuses_contradictions(tmp_path):
    record = Record(tmp_path, "moe")
    with pytest.raises(ConfigError, match="--zone is missing: there is no record of moe"):
        record.request({})
    request = PodRequest(**GOOD, slices=2)
    launch = Launch("pretrain", ("--workdir=gs://mine/run", "--config=a b"), ("A=1",))
    record.save(request, launch)
    assert record.request({}) == request
    assert record.request({"zone": "us-east5-a"}) == request
    assert record.launch() == launch
    assert record.launch().logs == "gs://mine/run/logs"
    with pytest.raises(ConfigError, match="--slices=3 contradicts"):
        record.request({"slices": 3})
    record.path.write_text("{")
    with pytest.raises(ConfigError, match="is no JSON"):
        record.request({})
    record.forget()
    assert not list(tmp_path.iterdir())
