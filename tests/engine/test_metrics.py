"""What a resumed run knows of what was logged before it."""

import json

import pytest
from detectron2.utils.events import EventStorage

from dfd.engine.writers import (
    ContinuedJSONWriter,
    cut_metrics,
    metrics_size,
    read_metrics,
    recent_scalars,
    restore_scalars,
)

VALUES = [3.0, 1.0, 4.0, 1.5, 9.0, 2.0, 6.0, 5.0] * 8


def log(storage, iterations, per_iteration=2):
    """Noisy scalars, several an iteration, and one that is seldom and not smoothed."""
    for iteration in iterations:
        storage.iter = iteration
        for k in range(per_iteration):
            storage.put_scalar("loss", VALUES[(iteration * 5 + k * 3) % len(VALUES)])
        storage.put_scalar("time", 1.0)
        if iteration % 10 == 9:
            storage.put_scalar("AP", iteration, smoothing_hint=False)


@pytest.mark.parametrize("stopped_after", [5, 29, 40])
@pytest.mark.parametrize("per_iteration", [1, 2, 3])
def test_medians_are_those_of_a_run_that_never_stopped(stopped_after, per_iteration):
    with EventStorage() as whole:
        log(whole, range(45), per_iteration)
    with EventStorage() as before:
        log(before, range(stopped_after), per_iteration)
        kept = json.loads(json.dumps(recent_scalars(before)))
    with EventStorage(stopped_after) as after:
        restore_scalars(after, kept)
        log(after, range(stopped_after, 45), per_iteration)
    expected, found = (s.latest_with_smoothing_hint(20) for s in (whole, after))
    assert found == expected


def test_what_is_kept_does_not_grow_with_the_run():
    with EventStorage() as storage:
        log(storage, range(200))
        kept = recent_scalars(storage)
    assert len(kept["loss"]["values"]) == 40
    assert kept["AP"]["values"] == [(199.0, 199)]
    # Describes the process, not the run.
    assert "time" not in kept


def write(folder, iterations, last):
    with EventStorage() as storage:
        writer = ContinuedJSONWriter(str(folder / "metrics.json"))
        for iteration in iterations:
            log(storage, [iteration])
            if iteration % 3 == 2 or iteration == last:
                writer.write()
        writer.close()


def test_metrics_are_cut_to_what_was_there_at_the_checkpoint(tmp_path):
    assert metrics_size(str(tmp_path)) == 0
    write(tmp_path, range(3), 2)
    size, before = metrics_size(str(tmp_path)), read_metrics(str(tmp_path / "metrics.json"))
    assert size > 0 and [line["iteration"] for line in before] == [2]
    with open(tmp_path / "metrics.json", "a") as f:
        # A line before the checkpoint, written by an interrupted run, and half a line of a killed
        # one.
        f.write('{"iteration": 1, "lr": 0.5}\n{"iteration": 3, "lo')
    cut_metrics(str(tmp_path), size)
    assert read_metrics(str(tmp_path / "metrics.json")) == before
    # One that was shortened by hand, or removed, stays as it is.
    cut_metrics(str(tmp_path), size + 100)
    assert metrics_size(str(tmp_path)) == size
    (tmp_path / "metrics.json").unlink()
    cut_metrics(str(tmp_path), size)


def test_restored_scalars_are_not_written_again(tmp_path):
    write(tmp_path, range(6), 5)
    with EventStorage() as storage:
        log(storage, range(6))
        kept = recent_scalars(storage)
    with EventStorage(6) as storage:
        restore_scalars(storage, kept)
        writer = ContinuedJSONWriter(str(tmp_path / "metrics.json"))
        writer.write()
        assert [line["iteration"] for line in read_metrics(str(tmp_path / "metrics.json"))] == [
            2,
            5,
        ]
        log(storage, [6])
        writer.write()
    assert [line["iteration"] for line in read_metrics(str(tmp_path / "metrics.json"))] == [2, 5, 6]
