"""Converts checkpoints to and from PyTorch, exactly, in bounded memory.

A Hugging Face directory becomes a workdir that mmx.load, launch.generate and --config.checkpoint.initial read:

  python -m launch.convert --source=MiniMax-Text-01 --target=runs/text_01

A workdir, or one checkpoint of it, becomes a Hugging Face directory, of the released layout or of Transformers' own:

  python -m launch.convert --source=runs/text_01 --target=exported --layout=transformers --shard_size=5GB --verify

Nothing is written but into the target. An export that was interrupted goes on when the same command is given again.
"""

import os
from pathlib import Path

from absl import flags

from launch import program

_SOURCE = flags.DEFINE_string(
    "source", None, "Hugging Face directory, workdir of a run, or one of its checkpoints.", required=True
)
_TARGET = flags.DEFINE_string("target", None, "Folder to write.", required=True)
_LAYOUT = flags.DEFINE_enum(
    "layout",
    None,
    ["released", "transformers"],
    "Of an export; released if not given. With a Hugging Face directory as source: rewrite it in this layout.",
)
_SHARD_SIZE = flags.DEFINE_string("shard_size", "5GB", "Largest size of a file of an export, as in 500MB or 2GiB.")
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "Of the weights written, router matrices aside; the source's if not given."
)
_VERIFY = flags.DEFINE_bool(
    "verify",
    False,
    "Read both sides again and compare the checksum of every tensor; with PyTorch and Transformers installed, compare "
    "the logits of a small model of the same kind too.",
)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Check the source, print what would be written, and write nothing.")


def run() -> None:
    """Converts as the flags say, and prints what was done."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # Files in, files out: no accelerator is taken for it.
    from mmx.convert.conversion import convert, parse_size

    convert(
        Path(_SOURCE.value),
        Path(_TARGET.value),
        layout=_LAYOUT.value,
        shard_bytes=parse_size(_SHARD_SIZE.value),
        dtype=_DTYPE.value,
        verify=_VERIFY.value,
        dry_run=_DRY_RUN.value,
        say=lambda message: print(message, flush=True),
    )


if __name__ == "__main__":
    program.main(run)
