"""Related files as one document: the files of a whole package, in an order in which they can be read.

Code is written across files, and what a file needs is mostly in its neighbours; put together, a package is a long
document whose far context is of use. Of Python files, a module comes after the modules of the package that it imports
(cycles are cut where they are met), as a reader or an interpreter would have it; other files keep the order of their
paths. Each file is headed by its path.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

# A folder with one of these is a package of whatever language.
MANIFESTS = ("pyproject.toml", "setup.py", "Cargo.toml", "go.mod", "package.json")
_PYTHON_PACKAGE = "__init__.py"
_IMPORT = re.compile(
    r"^[ \t]*(?:from[ \t]+(\.*[\w.]*)[ \t]+import[ \t]+(\([^)]*\)|[^\n#]*)|import[ \t]+([^\n#]*))", re.MULTILINE
)


def packages(files: Iterable[Path], root: Path) -> dict[Path, list[Path]]:
    """Files by what they make up: a package's folder, or a file that belongs to none.

    A file's package is the nearest folder above it, up to ``root``, that has a manifest, else the outermost of the
    Python packages that it is nested in.
    """
    grouped: dict[Path, list[Path]] = {}
    known: dict[Path, Path | None] = {}
    for file in files:
        folder = file.parent
        if folder not in known:
            known[folder] = _package_folder(folder, root)
        grouped.setdefault(known[folder] or file, []).append(file)
    return grouped


def _package_folder(folder: Path, root: Path) -> Path | None:
    above = [folder, *folder.parents]
    above = above[: above.index(root) + 1]
    for candidate in above:
        if any((candidate / name).exists() for name in MANIFESTS):
            return candidate
    outermost = None
    for candidate in above:
        if not (candidate / _PYTHON_PACKAGE).exists():
            break
        outermost = candidate
    return outermost


def join(texts: dict[str, str]) -> str:
    """One text of several files.

    Args:
      texts: of each file by its path, which starts with the package's folder and has forward slashes.
    """
    return "\n".join(f"==> {path} <==\n{texts[path]}" for path in reading_order(texts))


def reading_order(texts: dict[str, str]) -> list[str]:
    """Paths of ``texts``, what a Python file imports before the file."""
    modules = {_module(path): path for path in texts if path.endswith(".py")}
    needs = {
        path: sorted({modules[name] for name in _imports(path, texts[path]) if name in modules} - {path})
        for path in modules.values()
    }
    return _after_needs(sorted(texts), lambda path: needs.get(path, []))


def _after_needs(paths: list[str], needs: Callable[[str], list[str]]) -> list[str]:
    """Depth first without recursion: packages may be deeper than Python's stack."""
    order, seen = [], set()
    for root in paths:
        stack = [] if root in seen else [(root, iter(needs(root)))]
        seen.add(root)
        while stack:
            path, rest = stack[-1]
            following = next((other for other in rest if other not in seen), None)
            if following is None:
                order.append(path)
                stack.pop()
            else:
                seen.add(following)
                stack.append((following, iter(needs(following))))
    return order


def _module(path: str) -> str:
    return ".".join(PurePosixPath(path).with_suffix("").parts).removesuffix(".__init__")


def _imports(path: str, text: str) -> set[str]:
    """Dotted names that a Python file may import, relative ones resolved."""
    # What a relative import starts from: the folder, by the dots less one.
    folder = PurePosixPath(path).parent.parts
    found = set()
    for origin, names, plain in _IMPORT.findall(text):
        if plain:
            found |= {name.split()[0] for name in plain.split(",") if name.strip()}
            continue
        dots = len(origin) - len(origin.lstrip("."))
        above = ".".join(folder[: len(folder) - dots + 1]) if dots else ""
        base = ".".join(part for part in (above, origin.lstrip(".")) if part)
        # The name may be a module or something in one.
        for name in names.strip("()").replace("\n", ",").split(","):
            if name.strip():
                found |= {base, f"{base}.{name.split()[0]}"}
    return found
