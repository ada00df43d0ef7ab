"""Raw documents from plain files, JSON lines and Parquet.

A source is a name and a path; iterating it again reads it again, so nothing larger than a document is ever in memory.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from mmx.config import ConfigError
from mmx.data import packages

# Files of these kinds hold one document a row.
_ROWS = (".jsonl", ".jsonl.gz", ".parquet")
# The standard library's packages that are no part of it, or no text to learn from.
_NOT_LIBRARY = ("site-packages", "dist-packages", "__pycache__", "lib2to3/tests/data")


@dataclasses.dataclass(frozen=True)
class Document:
    """One document; its name, or that of what it is a file of, stable across machines, decides if it is held out."""

    name: str
    text: str
    package: str = ""

    @property
    def held_out_with(self) -> str:
        """The name that all documents with the same text in them share."""
        return self.package or self.name


@dataclasses.dataclass
class Source:
    """Documents under a path.

    Attributes:
      name: of the source, also that of its folder in the prepared data.
      path: a file, or a folder that is read recursively. ``.jsonl``, ``.jsonl.gz`` and ``.parquet`` files hold one
        document a row; any other file is one document.
      suffixes: files of a folder that are taken, by ending; empty takes all.
      text_field: column or key of the text.
      excluded: relative folders that are skipped.
      join: "package" makes one document of the files of a package of source code (mmx.data.packages), "both" keeps
        the files as documents besides. Files that belong to no package, and rows, stay documents of their own.
      unreadable: files left out so far because they are not UTF-8 text.
    """

    name: str
    path: Path
    suffixes: tuple[str, ...] = ()
    text_field: str = "text"
    excluded: tuple[str, ...] = ()
    join: Literal["", "package", "both"] = ""
    unreadable: int = 0

    def __iter__(self) -> Iterator[Document]:
        """Documents in a fixed order, empty ones left out. Raises ConfigError for a path or row that cannot be read."""
        self.unreadable = 0
        files = self._files()
        groups = packages.packages(files, self.path) if self.join else {path: [path] for path in files}
        for whole, members in groups.items():
            documents = self._read(whole) if whole.is_file() else self._read_package(whole, members)
            yield from (document for document in documents if document.text)

    def _read_package(self, folder: Path, files: list[Path]) -> Iterator[Document]:
        name, texts = self._name(folder), {}
        for path in files:
            if path.name.endswith(_ROWS):
                yield from self._read(path)
                continue
            for document in self._read(path):
                # Paths as an import spells them: from the package's own name on.
                texts["/".join([folder.resolve().name, *path.relative_to(folder).parts])] = document.text
                if self.join == "both":
                    yield dataclasses.replace(document, package=name)
        if any(texts.values()):
            yield Document(name, packages.join(texts))

    def _name(self, path: Path) -> str:
        return path.relative_to(self.path).as_posix() if path != self.path else path.resolve().name

    def _files(self) -> list[Path]:
        if not self.path.exists():
            raise ConfigError(f"source {self.name!r}: {self.path} does not exist")
        if self.path.is_file():
            return [self.path]
        files = [
            path
            for path in sorted(self.path.rglob("*"))
            if path.is_file()
            and (not self.suffixes or path.name.endswith(self.suffixes))
            and not any(f"/{folder}/" in f"/{path.relative_to(self.path).as_posix()}" for folder in self.excluded)
        ]
        if not files:
            wanted = f" ending in {', '.join(self.suffixes)}" if self.suffixes else ""
            raise ConfigError(f"source {self.name!r}: no file{wanted} under {self.path}")
        return files

    def _read(self, path: Path) -> Iterator[Document]:
        name = self._name(path)
        if path.name.endswith(".parquet"):
            yield from self._read_parquet(path, name)
        elif path.name.endswith(_ROWS):
            yield from self._read_jsonl(path, name)
        else:
            try:
                yield Document(name, path.read_bytes().decode("utf-8"))
            except UnicodeDecodeError:
                self.unreadable += 1

    def _read_jsonl(self, path: Path, name: str) -> Iterator[Document]:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ConfigError(f"{path}, line {number}: not valid JSON ({error})") from None
                text = row.get(self.text_field) if isinstance(row, dict) else None
                if not isinstance(text, str):
                    raise ConfigError(
                        f"{path}, line {number}: no string under {self.text_field!r}; name the key with --text_field"
                    )
                yield Document(f"{name}:{number}", text)

    def _read_parquet(self, path: Path, name: str) -> Iterator[Document]:
        try:
            import pyarrow.parquet
        except ImportError:
            raise ConfigError(f"{path}: reading Parquet needs pyarrow; pip install 'mmx[data]'") from None
        file = pyarrow.parquet.ParquetFile(path)
        if self.text_field not in file.schema_arrow.names:
            columns = ", ".join(file.schema_arrow.names)
            raise ConfigError(f"{path}: no column {self.text_field!r} (it has {columns}); name one with --text_field")
        number = 0
        for batch in file.iter_batches(columns=[self.text_field], batch_size=1024):
            for text in batch.column(0).to_pylist():
                number += 1
                if text is not None:
                    yield Document(f"{name}:{number}", text)


def standard_library() -> Source:
    """The source files of the running Python's standard library: real text that is on every machine."""
    return Source("python", Path(sysconfig.get_path("stdlib")), suffixes=(".py",), excluded=_NOT_LIBRARY)
