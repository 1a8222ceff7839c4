"""Files written whole or not at all, and the words nearest to a mistyped one."""

import hashlib

import pytest

from datamodules.loading.closest import did_you_mean
from datamodules.loading.files import sha256_of, whole_file, write_text


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "new" / "a.txt"
    write_text(file, "one\r\nä")
    assert file.read_bytes() == "one\r\nä".encode() and sha256_of(file) == hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(RuntimeError), whole_file(file) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert file.read_bytes() == "one\r\nä".encode() and [each.name for each in file.parent.iterdir()] == ["a.txt"]


def test_the_nearest_words():
    assert did_you_mean("digit", ["folder", "digits"]) == "; did you mean digits?"
    assert did_you_mean("Fold Column", ["fold_column"], "{!r}") == "; did you mean 'fold_column'?"
    assert did_you_mean("resnet51", ["resnet50", "resnet152"], "timm/{}", 1) == "; did you mean timm/resnet50?"
    assert did_you_mean("x", ["folder"]) == ""
