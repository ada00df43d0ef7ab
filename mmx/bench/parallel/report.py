"""The sections of the report, one after the other."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

# Section -> "module:function" that takes ``say`` and returns a list of results.
SECTIONS = {
    "lasp": "mmx.bench.parallel.lasp:measure",
    "ring": "mmx.bench.parallel.ring:measure",
    "overlap": "mmx.bench.parallel.overlap:measure",
}
_DEVICES = 8


def report(say: Callable[[str], None], output: Path | None) -> dict[str, Any]:
    """Runs every section on virtual CPU devices. JAX must not have started yet.

    Args:
      say: receives lines of text.
      output: JSON file for the results.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={_DEVICES}"
    results = {}
    for name, target in SECTIONS.items():
        say(f"== {name}")
        module, function = target.split(":")
        results[name] = getattr(import_module(module), function)(lambda line: say(f"   {line}"))
        if output is not None:
            output.write_text(json.dumps(results, indent=2) + "\n")
    return results
