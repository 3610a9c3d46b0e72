"""JSON and files."""

from __future__ import annotations

import json
import os
import stat

import pytest

from dsv4.cli._output import check_writable, dumps, human_bytes, replacing, write_text


def test_a_file_is_replaced_at_the_end(tmp_path):
    """While it is written the old file stands; then it is the new one, with the rights of any new file."""
    path = tmp_path / "folder" / "file.txt"
    write_text(path, "old")
    with replacing(path) as beside:
        beside.write_text("new")
        assert beside.suffix == path.suffix
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    assert list(path.parent.iterdir()) == [path]


def test_a_failure_leaves_nothing(tmp_path):
    """If writing fails, the old file stays and nothing is left beside it."""
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def write_half() -> None:
        with replacing(path) as beside:
            beside.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_has_no_nan():
    """NaN is no JSON: better an error here than a file that others cannot read."""
    assert json.loads(dumps({"a": [1, None, "ü"]})) == {"a": [1, None, "ü"]}
    with pytest.raises(ValueError, match="JSON"):
        dumps({"a": float("nan")})


def test_check_writable(tmp_path):
    """A folder is no file to write, and a file no folder; a missing folder can be made, but is not yet."""
    with pytest.raises(IsADirectoryError):
        check_writable(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        check_writable(tmp_path / "file" / "below")
    check_writable(tmp_path / "new" / "newer" / "file")
    assert not (tmp_path / "new").exists()
    check_writable(None)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (56_623_872, "56.6 MB"), (1.6e9, "1.6 GB"), (2e13, "20 TB")],
)
def test_human_bytes(count, text):
    """Decimal units, three digits."""
    assert human_bytes(count) == text
