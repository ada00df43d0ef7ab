"""Documents from plain files, JSON lines and Parquet."""

import gzip
import json

import pytest

from mmx.config import ConfigError
from mmx.data.sources import Document, Source, standard_library


def test_plain_files(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a.py").write_text("one")
    (tmp_path / "b" / "c.py").write_text("two ☃")
    (tmp_path / "b" / "d.txt").write_text("three")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "latin.py").write_bytes(b"caf\xe9")
    source = Source("code", tmp_path, suffixes=(".py",))
    assert list(source) == [Document("a.py", "one"), Document("b/c.py", "two ☃")]
    assert source.unreadable == 1
    assert [d.name for d in Source("all", tmp_path, excluded=("b",))] == ["a.py"]
    assert list(Source("file", tmp_path / "a.py")) == [Document("a.py", "one")]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_jsonl(tmp_path, name):
    path = tmp_path / name
    rows = [{"text": "one"}, {"text": "two\nlines"}, {"text": ""}]
    with (gzip.open if name.endswith("gz") else open)(path, "wt") as file:
        file.write("\n\n".join(json.dumps(row) for row in rows))
    assert list(Source("web", path)) == [Document(f"{name}:1", "one"), Document(f"{name}:3", "two\nlines")]


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install 'mmx[data]'")
    from pyarrow import parquet

    table = pyarrow.table({"content": ["one", None, "two"], "id": [1, 2, 3]})
    parquet.write_table(table, tmp_path / "rows.parquet")
    source = Source("web", tmp_path, text_field="content")
    assert list(source) == [Document("rows.parquet:1", "one"), Document("rows.parquet:3", "two")]
    with pytest.raises(ConfigError, match=r"no column 'text' \(it has content, id\)"):
        list(Source("web", tmp_path))


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere does not exist"):
        list(Source("x", tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"no file ending in \.rs under"):
        list(Source("x", tmp_path, suffixes=(".rs",)))
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n{"text": 3}\n')
    with pytest.raises(ConfigError, match=r"rows\.jsonl, line 2: no string under 'text'"):
        list(Source("x", path))
    path.write_text('{"text": "fine"}\n{"text"\n')
    with pytest.raises(ConfigError, match=r"rows\.jsonl, line 2: not valid JSON"):
        list(Source("x", path))


def test_standard_library_is_there():
    names = {document.name for document in standard_library()}
    assert {"argparse.py", "json/decoder.py"} <= names
    assert not any("site-packages" in name for name in names)
