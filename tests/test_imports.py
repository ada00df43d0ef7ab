"""Data flows down the list of folders and nothing imports upward."""

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
# What each package may import of ours, besides itself. A package that is not listed fails the test until it is.
ALLOWED = {
    "pallas_kernels": set(),
    "mmx.config": set(),
    "mmx.parallel": {"mmx.config", "pallas_kernels"},
    "mmx.model": {"mmx.config", "mmx.parallel", "pallas_kernels"},
    "mmx.data": {"mmx.config"},
    "mmx.train": {"mmx.config", "mmx.parallel", "mmx.model", "mmx.data", "pallas_kernels"},
    "mmx.plan": {
        *("configs", "mmx.config", "mmx.parallel", "mmx.model", "mmx.train", "mmx.generate"),
        "pallas_kernels",
    },
    "mmx.generate": {"mmx.config", "mmx.parallel", "mmx.model", "pallas_kernels"},
    "mmx.convert": {"mmx.config", "mmx.model", "mmx.data", "mmx.train", "pallas_kernels"},
    "mmx.pod": {"mmx.config"},
    "mmx.bench": {
        *("configs", "mmx.config", "mmx.parallel", "mmx.model", "mmx.data", "mmx.train", "mmx.plan", "mmx.generate"),
        *("mmx.convert", "pallas_kernels"),
    },
    "mmx.pretrained": {"mmx.config", "mmx.convert", "mmx.model", "mmx.data", "mmx.train", "mmx.generate"},
    "mmx": {"mmx.pretrained"},
    "configs": {"mmx.config"},
    "launch": {
        "mmx.pod",
        *("mmx", "mmx.bench", "mmx.config", "mmx.convert", "mmx.data", "mmx.parallel", "mmx.train", "mmx.generate"),
        "mmx.plan",
    },
}
LOCAL = ("pallas_kernels", "mmx", "configs", "launch", "tests")


def package(module: str) -> str:
    """The entry of ALLOWED that a module belongs to."""
    parts = module.split(".")
    return ".".join(parts[: 2 if parts[0] == "mmx" else 1])


def imports(path: Path) -> set[str]:
    """Packages of ours that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module}
    return {package(name) for name in found if name.split(".")[0] in LOCAL}


FILES = [path for folder in LOCAL[:-1] for path in sorted((REPOSITORY / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_imports_flow_one_way(path):
    module = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
    own = package(module)
    assert imports(path) - {own} <= ALLOWED[own]


def test_allowed_imports_have_no_circle():
    remaining = dict(ALLOWED)
    while remaining:
        free = [name for name, needs in remaining.items() if not needs & remaining.keys()]
        assert free, f"circle among {sorted(remaining)}"
        for name in free:
            del remaining[name]


def test_configuration_needs_no_jax():
    for path in (REPOSITORY / "mmx" / "config").glob("*.py"):
        assert "import jax" not in path.read_text()
