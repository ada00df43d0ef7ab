"""Turns raw text into data that launch.pretrain reads: split, tokenized and indexed.

Without --source it takes the Python standard library's source code, which is on every machine:

  python -m launch.prepare --output=data/standard_library

Any number of sources, each plain files (one document a file), JSON lines or Parquet (one document a row):

  python -m launch.prepare --output=data/mine --vocab_size=32768 --source=web=crawl.jsonl --source=code=/home/me/src

For long contexts: whole packages of source code as one document each, and questions about what stands far before:

  python -m launch.prepare --output=data/long --join=package --long_qa=python
"""

import dataclasses
from pathlib import Path

from absl import flags

from launch import program
from mmx.config import ConfigError

_OUTPUT = flags.DEFINE_string("output", None, "Folder to write; it must not exist yet.", required=True)
_SOURCE = flags.DEFINE_multi_string("source", [], "NAME=PATH of a file or folder; may be given several times.")
_SUFFIX = flags.DEFINE_list("suffix", [], "File endings taken from folders, as in .py,.md; empty takes every file.")
_JOIN = flags.DEFINE_enum(
    "join",
    None,
    ["package", "both"],
    "package makes one long document of the files of a package of source code, each headed by its path; both keeps the "
    "files as documents besides.",
)
_TEXT_FIELD = flags.DEFINE_string("text_field", "text", "Key or column that holds the text of a row.")
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 2048, "Tokens of the tokenizer to train, special ones included.")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "An existing tokenizer.json to use instead of training one.")
_HELDOUT = flags.DEFINE_float("heldout_fraction", 0.03, "Share of documents held out, chosen by a hash of their names.")
_LONG_QA = flags.DEFINE_multi_string(
    "long_qa",
    [],
    "NAME of a source: makes another one, NAME_qa, of questions about what stands far before in its text.",
)
_LONG_QA_TOKENS = flags.DEFINE_integer("long_qa_tokens", 0, "Tokens of those questions; 0 is a tenth of the source's.")
_LONG_QA_LENGTHS = flags.DEFINE_list("long_qa_lengths", ["1024", "131072"], "Tokens of the shortest and the longest.")
_SEED = flags.DEFINE_integer("seed", 0, "Decides what is drawn for --long_qa.")
_SKIP = flags.DEFINE_bool("skip_if_exists", False, "Do nothing if the output is there already.")


def run() -> None:
    """Prepares data as the flags say."""
    from mmx.data.prepare import REPORT, prepare
    from mmx.data.sources import standard_library

    output = Path(_OUTPUT.value)
    if _SKIP.value and (output / REPORT).exists():
        print(f"{output} is prepared already")
        return
    sources = [_source(entry) for entry in _SOURCE.value] or [standard_library()]
    sources = [dataclasses.replace(source, join=_JOIN.value or "") for source in sources]
    report = prepare(
        sources,
        output,
        tokenizer=Path(_TOKENIZER.value) if _TOKENIZER.value else None,
        vocab_size=_VOCAB_SIZE.value,
        heldout_fraction=_HELDOUT.value,
        long_qa=[_long_qa(name) for name in _LONG_QA.value],
        progress=lambda message: print(message, flush=True),
    )
    print(f"wrote {output} in {report['seconds']:.0f} s, vocabulary {report['vocab_size']:,}")


def _long_qa(source: str):
    from mmx.data.long_qa import LongQA

    try:
        shortest, longest = (int(length) for length in _LONG_QA_LENGTHS.value)
    except ValueError:
        given = ",".join(_LONG_QA_LENGTHS.value)
        raise ConfigError(f"--long_qa_lengths={given}: give two numbers of tokens, as in 1024,131072") from None
    return LongQA(source, _LONG_QA_TOKENS.value, (shortest, longest), _SEED.value)


def _source(entry: str):
    from mmx.data.sources import Source

    name, separator, path = entry.partition("=")
    if not (separator and name and path) or "/" in name:
        raise ConfigError(f"--source={entry}: write NAME=PATH, as in --source=web=crawl.jsonl")
    return Source(name, Path(path), suffixes=tuple(_SUFFIX.value), text_field=_TEXT_FIELD.value)


if __name__ == "__main__":
    program.main(run)
