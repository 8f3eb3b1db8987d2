"""Files of commands: new, and whole or not there."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
from modes_obeyed import with_mode

from lfmcw_app.errors import InputError
from lfmcw_app.output_files import check_new, new_file

ENDED = """
import signal, sys
from pathlib import Path
from lfmcw_app.output_files import new_file
with new_file(Path(sys.argv[1])) as unfinished:
    unfinished.mkdir()
    (unfinished / "a.png").touch()
    signal.raise_signal(int(sys.argv[2]))
"""


def test_a_file_has_its_name_when_it_is_whole(tmp_path):
    path = tmp_path / "table.csv"
    with new_file(path) as temporary:
        temporary.write_text("half")
        assert temporary.suffix == ".csv"
        assert not path.exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["table.csv"]
    assert path.read_text() == "half"


def test_nothing_is_left_of_what_failed(tmp_path):
    def fail(error):
        with new_file(tmp_path / "a.csv") as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(InputError, match="wrong"):
        fail(InputError("wrong"))
    with pytest.raises(InputError, match=r"a\.csv cannot be written \(No space left"):
        fail(OSError(28, "No space left on device"))
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_a_folder_that_gets_no_name(tmp_path):
    """Another program takes the name meanwhile, or a virus scanner holds a file."""
    place = tmp_path / "made"

    def write():
        with new_file(place) as unfinished:
            unfinished.mkdir()
            (unfinished / "a.png").write_text("whole")
            (place / "taken").mkdir(parents=True)

    with pytest.raises(InputError, match=r"made cannot be written \(.*not empty"):
        write()
    assert [entry.name for entry in tmp_path.iterdir()] == ["made"]


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "mine.png").write_text("mine")
    with pytest.raises(InputError, match="nothing is overwritten"):
        check_new(tmp_path / "mine.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(InputError, match="nothing is overwritten"):
        check_new(tmp_path / "link.png")
    with pytest.raises(InputError, match="there is no folder"):
        check_new(tmp_path / "nowhere" / "a.png")


def test_a_folder_that_cannot_be_written_is_told_at_once(tmp_path):
    with with_mode(tmp_path, 0o500), pytest.raises(InputError, match=r"\(Permission denied\)"):
        check_new(tmp_path / "a.csv")
    with pytest.raises(InputError, match=r"\(File name too long\)"):
        check_new(tmp_path / f"{'a' * 250}.csv")  # the name alone has room, the unfinished one not
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_process_that_is_ended_leaves_nothing_unfinished(tmp_path, number):
    command = [sys.executable, "-c", ENDED, str(tmp_path / "made"), str(int(number))]
    assert subprocess.run(command, check=False).returncode == 128 + number
    assert list(tmp_path.iterdir()) == []
