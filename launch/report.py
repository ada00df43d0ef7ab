"""Draws a run: loss against tokens, held-out bits per byte, router load, learning rate and speed.

python -m launch.report --workdir=runs/quickstart
"""

from pathlib import Path

from absl import flags

from launch import program

_WORKDIR = flags.DEFINE_string("workdir", None, "Workdir of a run.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Folder for the picture and the page; the workdir if not given.")


def run() -> None:
    """Writes report.png and report.html and prints where."""
    from mmx.train.report import write_report

    workdir = Path(_WORKDIR.value)
    report = write_report(workdir, Path(_OUTPUT.value) if _OUTPUT.value else workdir)
    for name, value in report.facts.items():
        print(f"{name + ':':22} {value}")
    print(f"wrote {report.picture}\nwrote {report.page}")


if __name__ == "__main__":
    program.main(run)
