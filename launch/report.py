"""Draws a run: loss against tokens, held-out bits per byte, router load, learning rate and speed.

  python -m launch.report --workdir=runs/quickstart

Where the run measured it, the held-out loss by position too. Of several runs that accumulate over micro-batches, the
critical batch size against the loss, and the losses at which a batch should double (--config.train.batch_marks):

  python -m launch.report --critical_batch=runs/narrow,runs/middle,runs/wide --output=runs/critical_batch
"""

from pathlib import Path

from absl import flags

from launch import program
from mmx.config import ConfigError

_WORKDIR = flags.DEFINE_string("workdir", None, "Workdir of a run.")
_CRITICAL_BATCH = flags.DEFINE_list("critical_batch", [], "Workdirs of several runs whose noise is fitted together.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder for pictures and pages; the (first) workdir if not given.")


def run() -> None:
    """Writes the pictures and prints where, and what they say."""
    if bool(_WORKDIR.value) == bool(_CRITICAL_BATCH.value):
        raise ConfigError("give either --workdir of a run or --critical_batch with the workdirs of several")
    if _WORKDIR.value:
        _of_a_run(Path(_WORKDIR.value))
    else:
        _of_critical_batch([Path(workdir) for workdir in _CRITICAL_BATCH.value])


def _of_a_run(workdir: Path) -> None:
    from mmx.train.report import write_report

    report = write_report(workdir, Path(_OUTPUT.value) if _OUTPUT.value else workdir)
    for name, value in report.facts.items():
        print(f"{name + ':':22} {value}")
    print("\n".join(f"wrote {path}" for path in (*report.pictures, report.page)))


def _of_critical_batch(workdirs: list[Path]) -> None:
    from mmx.train.critical_batch import PICTURE, RESULT, write_critical_batch

    output = Path(_OUTPUT.value) if _OUTPUT.value else workdirs[0]
    fit = write_critical_batch(workdirs, output)
    print(f"critical batch size = {fit['scale']:.3g} x loss^{fit['exponent']:.2f} tokens")
    print(f"points lie within a factor of {fit['typical_factor_off']:.2f} of it, typically")
    for tokens, loss in fit["doubling_marks"].items():
        print(f"go to {int(tokens):,} tokens a step at loss {loss}")
    marks = ",".join(str(loss) for loss in fit["doubling_marks"].values())
    print(f"as flags: --config.train.batch_marks='({marks})'")
    print(f"wrote {output / PICTURE}\nwrote {output / RESULT}")


if __name__ == "__main__":
    program.main(run)
