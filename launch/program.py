"""What all programs share: one clear sentence for a mistake, and overrides of configuration fields with suggestions."""

from __future__ import annotations

import contextlib
import errno
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from mmx.config import ConfigError, Run, check_field

MISTAKE = 1


def define_config(default: str | None = None) -> flags.FlagHolder:
    """Defines ``--config=FILE[:ARG]`` and ``--config.branch.field=value``."""
    return config_flags.DEFINE_config_file(
        "config", default, "File with get_config(); any field can be overridden, as in --config.train.steps=100"
    )


def main(run: Callable[[], int | None]) -> None:
    """Parses the flags, calls ``run`` and exits with what it returns; mistakes are one sentence and status 1."""

    def start(argv: Sequence[str]) -> int | None:
        with _one_sentence():
            if len(argv) > 1:
                raise ConfigError(f"{argv[1]!r} is not a flag: write it as --name=value")
            return run()

    app.run(start, flags_parser=_parse)


def _parse(argv: Sequence[str]) -> list[str]:
    # Libraries log progress of their own at lower levels; --verbosity brings it back.
    if not any(argument.lstrip("-").startswith(("verbosity", "v=")) for argument in argv):
        logging.set_verbosity(logging.ERROR)
    with _one_sentence():
        overrides = [argument for argument in argv if argument.lstrip("-").startswith("config.")]
        if overrides and "config" in flags.FLAGS:
            _check_overrides(argv, overrides)
        return app.parse_flags_with_usage(list(argv))


def _check_overrides(argv: Sequence[str], overrides: Sequence[str]) -> None:
    """ml_collections answers an unknown field with a bare KeyError; this names it and suggests the nearest."""
    given = any(argument.lstrip("-").startswith("config=") for argument in argv)
    if not given and flags.FLAGS["config"].default is None:
        raise ConfigError("--config is missing: give a file, as in --config=configs/quickstart.py")
    app.parse_flags_with_usage([argument for argument in argv if argument not in overrides])
    config: Any = flags.FLAGS["config"].value
    for override in overrides:
        check_field(config, override.lstrip("-").removeprefix("config.").split("=")[0])
    flags.FLAGS.unparse_flags()


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
        # Orbax and tensorstore wrap the system's error in their own.
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error):
            _fail("the disk is full: free some space, or choose another place; what was saved before is intact")
        raise


def _fail(message: str) -> None:
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr)
    sys.exit(MISTAKE)
