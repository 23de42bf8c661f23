"""Files written whole: refused before the work, absent or complete after it."""

import os
import subprocess
from pathlib import Path

import pytest

from coterie.errors import CoterieError
from coterie.storage.files import check_new_file, write_whole
from coterie.verbs.report import report


def test_a_file_is_absent_or_complete(tmp_path):
    """Whatever stops the writing, what had the name before has it still, and nothing else is left."""
    path = tmp_path / "page.html"
    path.write_text("old")

    def stop(partial: Path, error: BaseException) -> None:
        partial.write_text("half")
        raise error

    with pytest.raises(CoterieError, match=r"page\.html: cannot be written \(No space left on device\); free some$"):
        write_whole(path, lambda partial: stop(partial, OSError(28, "No space left on device")), hint="; free some")
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, lambda partial: stop(partial, KeyboardInterrupt()))
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    write_whole(path, lambda partial: partial.write_text("new"))
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Unless that does not matter."""
    seen = []
    monkeypatch.setattr(os, "fsync", lambda _: seen.append((tmp_path / "a").exists()))
    write_whole(tmp_path / "a", lambda partial: partial.write_text("x"))
    write_whole(tmp_path / "b", lambda partial: partial.write_text("x"), sync=False)
    assert seen == [False]


def test_what_cannot_be_written_is_known_before_the_work(tmp_path):
    """Names that the file, or the one that it is first, cannot have; files that exist, links to nothing among them."""
    (tmp_path / "a").write_text("x")
    (tmp_path / "link").symlink_to("nowhere")
    for name, says in [
        (".", "is a folder; expected a new file's name"),
        ("a", "exists already; give another name, or --overwrite"),
        ("link", "exists already"),
        ("a/b", "not a file name"),
        ("x" * 250, "not a file name"),
        ("\0", "not a file name"),
        ("no/b", "its folder is missing, or may not be written to; make it first"),
    ]:
        with pytest.raises(CoterieError, match=says):
            check_new_file(tmp_path / name, overwrite=False)
    for name in ("a", "link", "c"):
        check_new_file(tmp_path / name, overwrite=True)
    check_new_file(tmp_path / "c", overwrite=False)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a filesystem")
def test_a_page_for_a_folder_that_may_not_be_written_is_refused_first(tmp_path):
    """Not after the models were judged: here there are none."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("cannot mount")
    try:
        with pytest.raises(CoterieError, match="may not be written to"):
            report(["nowhere"], tmp_path / "page.html")
    finally:
        subprocess.run(["umount", tmp_path], check=True)
