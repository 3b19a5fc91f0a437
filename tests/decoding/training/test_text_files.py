"""Files and folders become texts, in an order that does not depend on the file system."""

import pytest

from decodax.decoding.training.text_files import read_texts


def test_folders_give_their_text_files_by_name(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("c.txt", "b/a.py", "a.md", ".hidden", ".git/config"):
        (tmp_path / name).write_text(f"{name} \u00e4")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "picture.png").write_bytes(b"PNG\0")
    (tmp_path / "latin.txt").write_bytes(b"\xe4")
    with pytest.warns(UserWarning, match="2 files are not text in UTF-8"):
        texts = read_texts([tmp_path / "c.txt", tmp_path])
    assert texts == ["c.txt \u00e4", "a.md \u00e4", "c.txt \u00e4", "b/a.py \u00e4"]


def test_a_named_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"\xe4")
    with pytest.raises(ValueError, match=r"latin.txt must be text in UTF-8"):
        read_texts([tmp_path / "latin.txt"])
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        read_texts([tmp_path / "nothing"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="hold no text"):
        read_texts([tmp_path / "empty"])
