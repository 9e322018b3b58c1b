"""What the benchmarks' commands share."""

import pytest
import typer

from benchmarks.command import check_out


def test_a_result_file_is_checked_before_and_nothing_is_made(tmp_path):
    (tmp_path / "result.json").touch()
    for name in ("a/b/result.txt", "result.json/c.json", "result.json/c/d.json"):
        with pytest.raises(typer.BadParameter):
            check_out(tmp_path / name, force=False)
        assert [each.name for each in tmp_path.iterdir()] == ["result.json"]
    with pytest.raises(typer.BadParameter, match="exists"):
        check_out(tmp_path / "result.json", force=False)
    check_out(tmp_path / "result.json", force=True)
    check_out(tmp_path / "a" / "b" / "result.json", force=False)
    assert [each.name for each in tmp_path.iterdir()] == ["result.json"]
    check_out(None, force=False)
