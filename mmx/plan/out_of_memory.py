"""The compiler's pages about too little memory, in one sentence."""

from __future__ import annotations

import re

from mmx.config import ConfigError
from mmx.plan.hlo import project_path
from mmx.plan.machine import Machine
from mmx.plan.memory import GiB, Memory


def one_sentence(error: Exception, machine: Machine, counted: Memory) -> Exception:
    """A compiler's message that the program does not fit, as one sentence; any other error as it is.

    It names the three largest buffers and where they come from. Where the temporaries alone are too large the compiler
    lists none: then the three largest parts of the count on paper are named.
    """
    message = str(error)
    if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
        return error
    sizes = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm", message) or re.search(
        r"\(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)", message
    )
    needs = f"needs {sizes[1]}iB and has {sizes[2]}iB" if sizes else "has too little"
    buffers = []
    for entry in re.split(r"\n\s*\d+\. Size: ", message)[1:]:
        size = entry.split()[0]
        shape = re.search(r"Shape: (\w+\[[\d,]*\])", entry)
        source = re.search(r'source_file="([^"]*)" source_line=(\d+)', entry)
        name = re.search(r'op_name="([^"]*)"', entry)
        where = (
            f"{project_path(source[1])}:{source[2]}" if source else (name[1].rpartition("/")[2] if name else "unknown")
        )
        buffers.append(f"{shape[1] if shape else 'a buffer'} of {size}iB from {where}")
    if buffers:
        largest = "; the largest buffers are " + ", ".join(buffers[:3])
    else:
        parts = sorted(vars(counted).items(), key=lambda item: -item[1])[:3]
        named = ", ".join(f"{name.replace('_', ' ')} {size / GiB:.1f} GiB" for name, size in parts)
        largest = f"; the compiler lists no buffers, on paper the largest parts are {named}"
    return ConfigError(
        f"out of memory: a device of {machine.name} {needs}{largest}: use more devices, split rows over "
        "mesh.context, raise train.micro_batches, or take another model.remat"
    )
