"""Stands in for training: counts steps into a workdir, saves every fifth, goes on from there, saves on SIGTERM.

At the steps in --hold it waits for a file go-STEP in the workdir, so that tests decide what happens meanwhile.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

# launch.pod looks for DEFINE_bool("distributed" in a launcher before it hands that flag over.
flags = dict(argument.lstrip("-").partition("=")[::2] for argument in sys.argv[1:])
assert "distributed" in flags, "not told that it has peers"
workdir, steps = Path(flags["workdir"]), int(flags["steps"])
holds = [int(step) for step in flags.get("hold", "").split(",") if step]
is_writer = os.environ["MMX_HOST_NAME"].split("-w-") == [os.environ["MMX_WRITER"], "0"]
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
(workdir / "checkpoints").mkdir(parents=True, exist_ok=True)


def newest() -> int:
    return max((int(path.name) for path in (workdir / "checkpoints").iterdir()), default=0)


def save(step: int) -> None:
    (workdir / "checkpoints" / str(step)).mkdir(exist_ok=True)


print("begins at", newest(), flush=True)
if (workdir / "crash").exists():
    if is_writer:
        time.sleep(0.2)
        (workdir / "crash").unlink()
    sys.exit("a step went wrong")
if not is_writer:
    while newest() < steps and not asked:
        time.sleep(0.01)
    sys.exit()
(workdir / "config.json").write_text(json.dumps({"train": {"steps": steps}}))
metrics = workdir / "metrics.jsonl"
rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
metrics.write_text("".join(json.dumps(row) + "\n" for row in rows if row["step"] <= newest()))
step = newest()
while step < steps and not asked:
    step += 1
    time.sleep(0.002)
    with metrics.open("a") as file:
        file.write(json.dumps({"step": step, "loss": 10.0 / step}) + "\n")
    if step % 5 == 0:
        save(step)
    while step in holds and not (workdir / f"go-{step}").exists() and not asked:
        time.sleep(0.01)
save(step)
