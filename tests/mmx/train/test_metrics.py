"""metrics.jsonl: every row readable at any time, and no row twice after a resume."""

from mmx.train.metrics import MetricsWriter, read_metrics


def write(workdir, resumed_step, steps):
    writer = MetricsWriter(workdir, resumed_step)
    for step in steps:
        writer.write({"step": step, "loss": 1.0 / (step + 1), "router_load": [[0.5, 0.5]]})
    writer.close()


def steps(workdir):
    return [row["step"] for row in read_metrics(workdir)]


def test_rows_of_steps_taken_again_are_dropped(tmp_path):
    write(tmp_path, None, range(1, 8))
    write(tmp_path, 4, range(5, 7))
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_run_that_starts_anew_keeps_nothing(tmp_path):
    write(tmp_path, None, range(4))
    write(tmp_path, None, range(2))
    assert steps(tmp_path) == [0, 1]


def test_line_cut_off_by_a_kill_is_dropped(tmp_path):
    write(tmp_path, None, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    assert steps(tmp_path) == [1, 2]
    write(tmp_path, 2, [3])
    assert steps(tmp_path) == [1, 2, 3]


def test_no_run_yet(tmp_path):
    assert read_metrics(tmp_path) == []
