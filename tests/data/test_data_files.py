"""The data file of conversations: a list or lines, of which none is read that memory does not hold."""

import json
import re
import tracemalloc

import pytest

from llava_jax.console import InputError
from llava_jax.data.conversations import read_conversation
from llava_jax.data.data_files import read_rows, summarize
from training import good_row, write_rows


def test_lists_and_lines_are_read_alike(tmp_path):
    rows = [good_row(i) for i in range(4)]
    assert list(read_rows(write_rows(tmp_path / "data.json", rows))) == rows
    assert list(read_rows(write_rows(tmp_path / "data.jsonl", rows))) == rows
    lines = tmp_path / "odd.jsonl"
    lines.write_bytes(b"\r\n\n  \n".join(json.dumps(row).encode() for row in rows))
    assert list(read_rows(str(lines))) == rows
    marked = tmp_path / "marked.json"
    marked.write_bytes(b"\xef\xbb\xbf" + json.dumps(rows).encode())
    assert list(read_rows(str(marked))) == rows
    marked.write_bytes(b"\xef\xbb\xbf" + b"\r".join(json.dumps(row).encode() for row in rows))
    assert list(read_rows(str(marked))) == rows
    marked.write_bytes(b" \n" * 40_000 + json.dumps(rows, indent=1).encode())
    assert list(read_rows(str(marked))) == rows


def test_a_surrogate_makes_its_own_row_invalid(tmp_path):
    """msgspec, which splits lists, rejects it in the whole list; JSON allows it."""
    path = tmp_path / "data.json"
    path.write_text('[{"id": 1}, {"id": "\\ud800"}, {"id": 3, "b": "\\ud83d\\ude42 ä"}]')
    assert list(read_rows(path)) == [{"id": 1}, {"id": "\ud800"}, {"id": 3, "b": "🙂 ä"}]


def test_a_line_has_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("llava_jax.data.data_files.MAX_LINE", 100)
    (tmp_path / "a.jsonl").write_bytes(b"{}\n" + b" " * 99 + b"\n" + b" " * 101)
    with pytest.raises(InputError, match="line 3 has more than 100 bytes"):
        read_rows(tmp_path / "a.jsonl")


def test_a_file_beyond_memory_is_not_begun(tmp_path, monkeypatch):
    monkeypatch.setattr("llava_jax.data.data_files.memory_bytes", lambda: 10)
    with pytest.raises(InputError, match=r"more than this machine's memory \(10\)"):
        read_rows(write_rows(tmp_path / "data.json", [good_row(0)]))


@pytest.mark.parametrize("value", ["[]", "{}", '"ab"', "1.5", "[[]]", '{"a":[1.5]}'])
def test_a_file_of_many_small_values_is_not_begun(tmp_path, monkeypatch, value):
    """Nor is more said to be needed than many times what it is."""
    path = tmp_path / "many.json"
    path.write_text(f"[{','.join([value] * 20_000)}]")
    tracemalloc.start()
    rows = read_rows(path)
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(rows) == 20_000
    monkeypatch.setattr("llava_jax.data.data_files.memory_bytes", lambda: taken // 2)
    with pytest.raises(InputError, match="its values may take") as said:
        read_rows(path)
    assert int(re.search(r"take ([\d,]+)", str(said.value))[1].replace(",", "")) < 4 * taken


@pytest.mark.parametrize(
    ("contents", "says"),
    [
        (None, "missing.json: cannot be read"),
        (b"", "has no conversations"),
        (b"[]", "has no conversations"),
        (b'[{"id": 1}, {"id": ]', "not JSON .*line 1 column"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path, contents, says):
    path = tmp_path / "missing.json"
    if contents is not None:
        path.write_bytes(contents)
    with pytest.raises(InputError, match=says):
        read_rows(str(path))


def test_a_row_has_at_most_so_many_images(tmp_path):
    """As many as are counted beforehand."""
    rows = [{"image": ["a.png"] * n, "conversations": good_row(0)["conversations"]} for n in (65_535, 65_536)]
    path = write_rows(tmp_path / "data.json", rows)
    assert summarize(path, read_rows(path)).image_counts.tolist() == [65_535, 65_535]
    assert len(read_conversation(rows[0]).images) == 65_535
    with pytest.raises(InputError, match="65,536 images; a row may have at most 65,535"):
        read_conversation(rows[1])
