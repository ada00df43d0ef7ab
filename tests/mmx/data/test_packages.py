"""Packages of source code as one document each."""

from mmx.data.packages import join, reading_order
from mmx.data.sources import Source

FILES = {
    "app/__init__.py": "from .core import run\n",
    "app/core.py": "import os\nfrom app.text.split import (\n    words,\n    lines as rows,\n)\n",
    "app/text/__init__.py": "",
    "app/text/split.py": "from .. import names\nfrom . import marks\n",
    "app/text/marks.py": "from app import core  # a circle\n",
    "app/names.py": "import app.zeta, sys\n",
    "app/zeta.py": "",
    "app/data.txt": "import nothing",
    "crate/Cargo.toml": "[package]",
    "crate/src/lib.rs": "mod a;",
    "crate/src/a.rs": "fn a() {}",
    "crate/tools/__init__.py": "a = 1",
    "alone.py": "print()",
    "notes/readme.md": "hello",
}


def write(root):
    for name, text in FILES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_what_is_imported_comes_first():
    order = reading_order({name: text for name, text in FILES.items() if name.startswith("app/")})
    assert sorted(order) == sorted(name for name in FILES if name.startswith("app/"))
    place = {name: order.index(name) for name in order}
    for first, second in (
        ("app/zeta.py", "app/names.py"),
        ("app/names.py", "app/text/split.py"),
        ("app/text/marks.py", "app/text/split.py"),
        ("app/text/split.py", "app/core.py"),
        ("app/core.py", "app/__init__.py"),
    ):
        assert place[first] < place[second]
    assert order == reading_order(dict(reversed([(name, FILES[name]) for name in order])))


def test_a_deep_chain_of_imports():
    chain = {f"p/m{n}.py": f"from . import m{n + 1}\n" for n in range(3000)}
    assert reading_order(chain) == [f"p/m{n}.py" for n in reversed(range(3000))]


def test_files_are_headed_by_their_paths():
    assert join({"p/b.py": "import p.a", "p/c.txt": "see"}) == "==> p/b.py <==\nimport p.a\n==> p/c.txt <==\nsee"


def test_source_joins_packages(tmp_path):
    documents = {document.name: document.text for document in Source("all", write(tmp_path), join="package")}
    assert list(documents) == ["alone.py", "app", "crate", "notes/readme.md"]
    assert documents["alone.py"] == "print()"
    for name, text in FILES.items():
        package, _, rest = name.partition("/")
        if package in ("app", "crate") and rest:
            assert f"==> {name} <==\n{text}" in documents[package]


def test_files_besides_are_held_out_with_their_package(tmp_path):
    root = write(tmp_path)
    documents = list(Source("all", root, join="both"))
    joined = {document.name: document.text for document in Source("all", root, join="package")}
    single = {document.name: document.text for document in Source("all", root)}
    assert {document.name: document.text for document in documents} == single | joined
    assert len(documents) == len(single | joined)
    for document in documents:
        package = document.name.split("/")[0]
        assert document.held_out_with == (package if package in ("app", "crate") else document.name)


def test_a_manifest_at_the_root_makes_one_document(tmp_path):
    root = write(tmp_path / "repo")
    (root / "pyproject.toml").write_text("[project]")
    (root / "rows.jsonl").write_text('{"text": "row"}')
    names = [document.name for document in Source("all", root, suffixes=(".py", ".jsonl"), join="package")]
    assert sorted(names) == ["crate", "repo", "rows.jsonl:1"]
