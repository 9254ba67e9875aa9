"""An output that cannot be written is refused before the work, and the check leaves nothing behind."""

import os
from pathlib import Path

import pytest

from allocator.contract.errors import InputError
from allocator.contract.outputs import check_output_file, check_output_folder


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "to-folder").symlink_to(tmp_path / "folder")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


@pytest.mark.parametrize("name", ["new.json", "file", "missing/parents/new.json", "to-folder/new.json", "nowhere"])
def test_a_file_that_can_be_written_is_not_made_by_the_check(place: Path, name: str) -> None:
    before = sorted(place.rglob("*"))
    check_output_file(place / name)
    assert sorted(place.rglob("*")) == before
    assert (place / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["new", "folder", "missing/parents/new", "to-folder", "to-folder/new"])
@pytest.mark.parametrize("replaced", [False, True])
def test_a_folder_that_can_be_written_is_not_made_by_the_check(place: Path, name: str, replaced: bool) -> None:
    before = sorted(place.rglob("*"))
    check_output_folder(place / name, replaced=replaced)
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("folder", "it is a folder"), ("to-folder", "it is a folder"), ("pipe", "no regular file"),
        ("file/new.json", "file is a file, no folder"), ("nowhere/new.json", "nowhere is a link that leads nowhere"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_written_is_refused_with_option_and_reason(place: Path, name: str, reason: str) -> None:
    with pytest.raises(InputError, match=f"--figure .*{reason}"):
        check_output_file(place / name, "--figure")


@pytest.mark.parametrize(
    ("name", "reason"),
    [("file", "it is a file"), ("file/new", "file is a file"), ("nowhere/new", "leads nowhere"), ("pipe", "is a file")],
)
def test_a_folder_that_cannot_be_written_is_refused_with_the_reason(place: Path, name: str, reason: str) -> None:
    with pytest.raises(InputError, match=f"--out .*{reason}"):
        check_output_folder(place / name)


def test_what_the_system_does_not_allow_is_refused_with_its_reason() -> None:
    with pytest.raises(InputError, match=r"nothing can be written in /proc \(.+\); give another place"):
        check_output_file(Path("/proc/new.json"))
    with pytest.raises(InputError, match="nothing can be written in /proc"):
        check_output_folder(Path("/proc/a/b"))


def test_a_mounted_disk_cannot_be_replaced_by_a_checkpoint() -> None:
    with pytest.raises(InputError, match=r"a disk is mounted there.*give a folder inside it"):
        check_output_folder(Path("/proc"), replaced=True)
