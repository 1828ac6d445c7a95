"""What the demo says of its models on the task."""

from dataclasses import replace

from mor.demo.task import TaskRow, task_table, task_verdict


def task_rows(hard, late):
    """hard: right answers above 8 hops of one pass, recursive and MoR; late: MoR's depth at the
    last four."""
    values = dict.fromkeys(TaskRow.__dataclass_fields__, 1.0)
    made = [
        TaskRow(
            **values
            | dict(
                name=name,
                answers_right_by_hops=[1.0] * 8 + [share] * 8,
                mean_depth_by_hops=[1.0] * 12 + [late] * 4,
            )
        )
        for name, share in zip(("one pass", "recursive", "MoR"), hard, strict=True)
    ]
    return [replace(row, effective_layers=3) for row in made]


def test_the_verdict_on_the_task_follows_from_the_numbers():
    said = task_verdict(task_rows((0.4, 0.9, 0.8), late=3.5))
    assert "one pass 40%, recursive 90%, MoR 80%" in said and "recursive 50 and MoR 40." in said
    assert "sends harder questions deeper: mean depth 1.00 at 1 to 4 hops, 3.50" in said
    only = task_verdict(task_rows((0.4, 0.9, 0.45), late=1.2))
    assert "in one pass: recursive 50." in only and "does not follow the hops" in only
    assert "depth did not pay here" in task_verdict(task_rows((0.4, 0.45, 0.3), late=1.0))


def test_the_table_of_the_task_has_means_over_spans_of_hops():
    cells = task_table(task_rows((0.4, 0.9, 0.8), late=3.5)).columns[-1]
    assert list(cells.cells) == ["40% right", "90% right", "80% right", *["depth 3.50"] * 3]
