"""What lies in place of a file that was never fetched is named, whatever the file would have been."""

import pytest

from fr_core.data.sources import list_source
from fr_core.errors import UserError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456\n"
PAGE = b"\n<!DOCTYPE html>\n<html><body>404 Not found</body></html>"
NAMES = ["zip", "tar", "tar.gz", "rec", "parquet", "arrow", "lmdb", "tfrecord", "csv"]


@pytest.mark.parametrize("name", NAMES)
def test_a_source_that_was_not_fetched(tmp_path, name):
    source = tmp_path / "sets" / f"a.{name}"
    source.parent.mkdir()
    source.write_bytes(POINTER)
    (tmp_path / "sets" / "README").touch()
    for given in (source,) if name == "csv" else (source, source.parent):
        with pytest.raises(UserError, match=rf"a\.{name}: a Git LFS pointer, not the file itself: run git lfs pull$"):
            list_source(given, scratch=tmp_path / "scratch")
    source.write_bytes(PAGE)
    with pytest.raises(UserError, match=rf"a\.{name}: a web page, not the file itself: download it again$"):
        list_source(source, scratch=tmp_path / "scratch")


def test_a_list_that_was_not_fetched(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "list.csv").write_bytes(POINTER)
    with pytest.raises(UserError, match=r"list\.csv: a Git LFS pointer"):
        list_source(tmp_path / "photos", tmp_path / "list.csv")
