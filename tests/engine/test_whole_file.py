"""Files that are there whole or not at all."""

import pytest

from dfd.engine.console import Interrupted
from dfd.engine.state.files import whole_file
from dfd.engine.stop import Stopped


@pytest.mark.parametrize(
    "error",
    [OSError("the disk is full"), Interrupted("SIGINT"), KeyboardInterrupt(), Stopped(15)],
)
def test_nothing_is_left_of_a_file_that_was_not_written(tmp_path, error):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(type(error)), whole_file(path) as f:
        f.write("new")
        raise error
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"] and path.read_text() == "old"


def test_every_name_that_a_file_may_have_is_written(tmp_path):
    for letter, count in (("a", 255), ("\N{GREEK SMALL LETTER PI}", 127)):
        with whole_file(tmp_path / (letter * count)) as f:
            f.write("whole")
        assert (tmp_path / (letter * count)).read_text() == "whole"
