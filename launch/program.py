"""What all programs share: one clear sentence for a mistake, and overrides of configuration fields with suggestions."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from mmx.config import ConfigError, Run, check_field

MISTAKE = 1
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CPU_DEVICES = "--xla_force_host_platform_device_count"


def define_config(default: str | None = None) -> flags.FlagHolder:
    """Defines ``--config=FILE[:ARG]`` and ``--config.branch.field=value``."""
    return config_flags.DEFINE_config_file(
        "config", default, "File with get_config(); any field can be overridden, as in --config.train.steps=100"
    )


def main(run: Callable[..., int | None], takes_arguments: bool = False) -> None:
    """Parses the flags, calls ``run`` and exits with what it returns; mistakes are one sentence and status 1.

    Args:
      run: the program.
      takes_arguments: True hands ``run`` the list of what is no flag; otherwise there must be nothing.
    """

    def start(argv: Sequence[str]) -> int | None:
        with _one_sentence():
            if takes_arguments:
                return run(argv[1:])
            if len(argv) > 1:
                raise ConfigError(f"{argv[1]!r} is not a flag: write it as --name=value")
            return run()

    app.run(start, flags_parser=_parse)


@contextlib.contextmanager
def leaving_at_once() -> Iterator[None]:
    """Ends the process as soon as what is inside fails, when it is one of several.

    The others wait for this one in some operation, and would wait on while it waits for theirs to bid farewell.
    """
    import jax

    if jax.process_count() == 1:
        yield
        return
    status = MISTAKE
    try:
        with _one_sentence():
            yield
            return
    except SystemExit as leaving:
        status = leaving.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _parse(argv: Sequence[str]) -> list[str]:
    with _one_sentence():
        overrides = [argument for argument in argv if argument.lstrip("-").startswith("config.")]
        if "config" in flags.FLAGS:
            _check_config(argv, overrides)
        try:
            rest = flags.FLAGS(list(argv))
        except SystemExit:
            sys.exit(0)  # Only --help and its kin leave here, and absl calls that a failure.
        except flags.Error as error:
            first = str(error).splitlines()[0]  # One line for each required flag that is missing.
            raise ConfigError(_FLAG_MISSING.sub(r"--\1 is missing", first)) from None
    # Libraries log progress of their own at lower levels; --verbosity brings it back.
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.ERROR)
    return rest


# How absl words a required flag that was not given.
_FLAG_MISSING = re.compile(r"^flag --(\w+)=None: .*")


def _check_config(argv: Sequence[str], overrides: Sequence[str]) -> None:
    """ml_collections answers a missing file or an unknown field with a traceback; this says what to change."""
    paths = [argument.partition("=")[2] for argument in argv if argument.lstrip("-").startswith("config=")]
    if not paths and overrides and flags.FLAGS["config"].default is None:
        raise ConfigError("--config is missing: give a file, as in --config=configs/quickstart.py")
    for path in paths:
        file = Path(path.partition(":")[0])
        if not file.is_file():
            known = ", ".join(sorted(str(other) for other in Path("configs").glob("[!_]*.py")))
            raise ConfigError(f"--config={path}: no such file" + (f"; there are {known}" if known else ""))
    if not overrides:
        return
    plain = [argument for argument in argv if argument not in overrides]
    given_argv, sys.argv = sys.argv, plain  # The config flag looks for its overrides there.
    try:
        flags.FLAGS(plain, known_only=True)
    finally:
        sys.argv = given_argv
    config: Any = flags.FLAGS["config"].value
    for override in overrides:
        name, has_value, _ = override.lstrip("-").removeprefix("config.").partition("=")
        check_field(config, name)
        if not has_value:
            raise ConfigError(f"{override}: write the value behind an equals sign, as in --config.{name}=VALUE")
    flags.FLAGS.unparse_flags()


def with_cpu_devices(count: int) -> str:
    """XLA_FLAGS of this process, with ``count`` virtual CPU devices."""
    others = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith(_CPU_DEVICES)]
    return " ".join([*others, f"{_CPU_DEVICES}={count}"])


def require_config(config: Any) -> Run:
    """The parsed configuration. Raises ConfigError if none was given."""
    if config is None:
        raise ConfigError("--config is missing: give a file, as in --config=configs/quickstart.py")
    return config


@contextlib.contextmanager
def _one_sentence() -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        _fail(str(error))
    except FileNotFoundError as error:
        _fail(f"{error.filename}: no such file")
    except PermissionError as error:
        _fail(f"{error.filename}: permission denied")
    except Exception as error:
        # Orbax and tensorstore wrap the system's error in their own. A limit on files is as good as a full disk.
        if getattr(error, "errno", None) in _FULL or any(os.strerror(number) in str(error) for number in _FULL):
            _fail("the disk is full: free some space, or choose another place; what was saved before is intact")
        raise


def _fail(message: str) -> None:
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr)
    sys.exit(MISTAKE)
