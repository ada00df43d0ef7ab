"""One conversion from start to end: which way, what is carried along, progress, and the proof."""

from __future__ import annotations

import math
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from mmx.config import ConfigError, ModelConfig, Run, count_parameters, save_json
from mmx.convert.checkpoint import CheckpointReader, require_room, write_checkpoint
from mmx.convert.config import CONFIG, RELEASED, from_huggingface, is_huggingface, read_config
from mmx.convert.export import Export, copy_sidecars
from mmx.convert.names import SEPARATE, tensors
from mmx.convert.safetensors import Directory
from mmx.convert.shards import Shard
from mmx.convert.source import Source, open_directory, parameter_shapes
from mmx.convert.twin import TOLERANCE, can_compare, twin_difference
from mmx.convert.verify import compare
from mmx.data.prepare import TOKENIZER
from mmx.train.checkpoint import CHECKPOINTS, find_checkpoints
from mmx.train.loop import CONFIG as RUN_CONFIG

# What a converted workdir keeps of the directory it came from, for the way back.
KEPT = "huggingface"
_ORBAX_UNFINISHED = ".orbax-checkpoint-tmp"
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_MOST_CACHE_BYTES = 512 << 20
_SECONDS_BETWEEN_LINES = 10

Say = Callable[[str], None]


def convert(
    source: Path,
    target: Path,
    *,
    layout: str | None,
    shard_bytes: int,
    dtype: str | None,
    verify: bool,
    dry_run: bool,
    say: Say,
) -> None:
    """Converts ``source`` into ``target``; see launch/convert.py for the arguments.

    Raises:
      ConfigError: for anything that cannot work, before or while it is written; nothing unfinished looks complete.
    """
    if not source.is_dir():
        raise ConfigError(f"{source} is not a directory")
    if source.resolve() == target.resolve():
        raise ConfigError(f"{target} is the source itself: choose another target")
    if not is_huggingface(source):
        folder, step = find_checkpoints(source)
        reader = CheckpointReader(folder, step, cache_bytes=min(shard_bytes // 4, _MOST_CACHE_BYTES))
        kept = folder.parent / KEPT
        inert = from_huggingface(read_config(kept)).inert if kept.is_dir() else {}
        sidecars = kept if kept.is_dir() else folder.parent
        origin = f"{reader.path.absolute()} of {(reader.path / '_CHECKPOINT_METADATA').stat().st_mtime_ns}"
        export = Export(
            reader.config, reader.read, target, origin, layout or RELEASED, dtype, shard_bytes, inert, sidecars
        )
        _export(export, verify, dry_run, say)
        return
    opened, translation = open_directory(source, dtype)
    say(f"{source}: {translation.layout} layout, {_describe(opened.config)}")
    if layout is not None:
        stamp = max(path.stat().st_mtime_ns for path in source.glob("*.safetensors"))
        origin = f"{source.absolute()} of {stamp}"
        export = Export(
            opened.config, opened.read, target, origin, layout, dtype, shard_bytes, translation.inert, source
        )
        _export(export, verify, dry_run, say)
    else:
        _import(opened, source, target, verify, dry_run, say)


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB, 500MB or 2GiB. Raises ConfigError if it is none."""
    match = re.fullmatch(r"([\d.]+)\s*([KMGT]?I?)B?", text.strip().upper())
    if match is None or match[2] not in _UNITS or match[1].count(".") > 1 or not float(match[1]) > 0:
        raise ConfigError(f"{text!r} is no size: write it as in 5GB, 500MB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def _import(opened: Source, source: Path, target: Path, verify: bool, dry_run: bool, say: Say) -> None:
    shapes = parameter_shapes(opened.config)
    total = sum(x.size * x.dtype.itemsize for x in shapes.values())
    if dry_run:
        say(f"would write {len(shapes)} arrays, {_size(total)}, into {target / CHECKPOINTS / '0'}")
        return
    _clear(target)
    require_room(target, total)
    # The checkpoint comes last: without it there is nothing that looks complete.
    copy_sidecars(source, target / KEPT)
    (target / KEPT / CONFIG).write_text((source / CONFIG).read_text())
    if (source / TOKENIZER).exists():
        shutil.copyfile(source / TOKENIZER, target / TOKENIZER)
    save_json(Run(model=opened.config), target / RUN_CONFIG)
    progress = _Progress("written", total, say)
    write_checkpoint(opened, target / CHECKPOINTS, progress)
    say(f"wrote {target / CHECKPOINTS / '0'}: {progress.summary()}")
    if verify:
        _verify(opened.config, opened.reader, opened.spelling, CheckpointReader(target / CHECKPOINTS).read, say)


def _clear(target: Path) -> None:
    """Removes what an interrupted import left. Raises ConfigError if the target holds anything else."""
    if not target.exists():
        return
    checkpoints = target / CHECKPOINTS
    unfinished = [path for path in checkpoints.glob("*") if path.name.endswith(_ORBAX_UNFINISHED)]
    finished = checkpoints.exists() and len(unfinished) < len(list(checkpoints.iterdir()))
    if finished or {path.name for path in target.iterdir()} - {CHECKPOINTS, KEPT, RUN_CONFIG, TOKENIZER}:
        raise ConfigError(f"{target} is not empty: choose another target, or remove it")
    shutil.rmtree(target)


def _export(export: Export, verify: bool, dry_run: bool, say: Say) -> None:
    plan = export.plan()
    if dry_run:
        export.fields()  # Refuses what the layout cannot say.
        say(f"would write {_shards(plan)} into {export.target}: {_describe(export.config)}")
        return
    progress = _Progress("written", sum(shard.nbytes for shard in plan), say)
    export.run(progress)
    say(f"wrote {_shards(plan)} into {export.target}: {progress.summary()}")
    if export.layout != RELEASED and export.config.rotary_dim != export.config.head_dim:
        say(
            f"note: this model rotates {export.config.rotary_dim} of {export.config.head_dim} channels of a head; "
            "Transformers' class (up to 5.24 at least) rotates all and gives other logits until it reads "
            "partial_rotary_factor"
        )
    if verify:
        _verify(export.config, Directory(export.target), SEPARATE, export.read, say)


def _verify(config: ModelConfig, reader: Directory, spelling: str, read: Callable, say: Say) -> None:
    sizes = {name: reader.info(name) for name in reader.names()}
    wanted = [sizes[tensor.name] for tensor in tensors(config, spelling)]
    total = sum(math.prod(info.shape) * info.dtype.itemsize for info in wanted)
    progress = _Progress("compared", total, say)
    count = compare(config, reader, spelling, read, progress)
    say(f"verified: the checksums of all {count:,} tensors agree ({progress.summary()})")
    reason = can_compare(config)
    if reason:
        say(f"logits of a small twin were not compared: {reason}")
        return
    difference = twin_difference(config)
    if difference > TOLERANCE:
        raise ConfigError(f"the logits of a small twin differ by {difference:.1e} from Transformers': do not use this")
    say(f"verified: logits of a small twin differ by {difference:.1e} from Transformers' (corrected for partial RoPE)")


class _Progress:
    """Says now and then how far a conversion is."""

    def __init__(self, verb: str, total: int, say: Say):
        self._verb, self._total, self._say = verb, total, say
        self._done, self._started = 0, time.monotonic()
        self._spoke = self._started

    def __call__(self, nbytes: int) -> None:
        self._done += nbytes
        now = time.monotonic()
        if now - self._spoke >= _SECONDS_BETWEEN_LINES:
            self._spoke = now
            share = self._done / max(self._total, 1)
            left = (now - self._started) * (1 - share) / max(share, 1e-9)
            self._say(f"  {self._verb} {_size(self._done)} of {_size(self._total)} ({share:.0%}, {left:,.0f} s left)")

    def summary(self) -> str:
        """Bytes, seconds and speed."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        return f"{_size(self._done)} in {seconds:.1f} s, {self._done / seconds / 1e9:.2f} GB/s"


def _describe(config: ModelConfig) -> str:
    count = count_parameters(config).total
    return f"{count:,} parameters in {config.num_layers} layers, {config.param_dtype}, {config.slope_rule} slopes"


def _shards(plan: Sequence[Shard]) -> str:
    files = "1 shard" if len(plan) == 1 else f"{len(plan):,} shards"
    return f"{sum(len(shard.specs) for shard in plan):,} tensors in {files}"


def _size(nbytes: int) -> str:
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.2f} {name}"
    return f"{nbytes / 1000:.1f} kB"
