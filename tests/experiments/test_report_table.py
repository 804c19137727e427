# SPDX-License-Identifier: Apache-2.0
"""Tables: width, numbers, JSON."""

import json
import math

import numpy as np
import pytest

from slimtorch.experiments import html
from slimtorch.report import MAX_WIDTH, Table, format_bytes, format_cell, format_number, format_seconds


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (266610, "266,610"), (0.0, "0"), (1.5, "1.500"), (12.345, "12.35"), (123.456, "123.5"),
        (12345.6, "12,346"), (0.01234, "0.0123"), (1e-6, "1e-06"), (2.5e9, "2.5e+09"), (float("nan"), "nan"),
        (-math.inf, "-inf"), (np.float32(0.5), "0.500"), (np.int64(1000), "1,000"),
    ],
)  # fmt: skip
def test_numbers(value, text):
    assert format_number(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (True, "yes"), ((16, 16), "16x16"), ("conv1", "conv1"), (["a", "b"], "['a', 'b']")]
)
def test_cells(value, text):
    assert format_cell(value) == text


def test_units():
    assert [format_seconds(value) for value in (2, 0.0123, 1.2e-4, 5e-9)] == ["2 s", "12.3 ms", "120 us", "5 ns"]
    assert [format_bytes(value) for value in (0, 1023, 2048, 1234567, 5 << 30)] == [
        "0 B", "1023 B", "2 KiB", "1.18 MiB", "5 GiB",
    ]  # fmt: skip


def test_str_is_plain_and_at_most_100_columns_wide():
    long = "a sentence that goes on and on, " * 10
    table = Table("title " * 40, [f"column {i}" for i in range(12)], [[long, *range(11)]], [long])
    lines = str(table).splitlines()
    assert max(map(len, lines)) <= MAX_WIDTH
    assert "\x1b" not in str(table)
    assert "title" in lines[0]


def test_brackets_are_text_not_markup():
    table = Table("[bold]x[/bold]", ["[red]"], [["[/]"]], ["[/nothing]"])
    assert "[bold]x[/bold]" in str(table)
    assert "[/]" in str(table)


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"rows\[1\]: expected 2 cells, got 3"):
        Table("t", ["a", "b"], [[1, 2], [1, 2, 3]])


def test_to_dict_is_json():
    table = Table("t", ["a", "b", "c"], [[np.float32(1.5), (4, 5), float("nan")], [np.int64(3), None, "x"]], ["n"])
    back = json.loads(json.dumps(table.to_dict()))
    assert back == {
        "title": "t",
        "columns": ["a", "b", "c"],
        "rows": [[1.5, [4, 5], None], [3, None, "x"]],
        "notes": ["n"],
    }


def test_markdown():
    lines = Table("t", ["a", "n"], [["x", 1000]]).to_markdown().splitlines()
    assert lines == ["| a | n |", "|---|---:|", "| x | 1,000 |"]


def test_empty_table_prints():
    assert "nothing" in str(Table("t", ["a"], [], ["nothing here"]))


def test_page_escapes_and_loads_nothing():
    table = Table("<t>", ["<c>"], [["<script>"], ["1.5"]], ["a & b"])
    text = html.page("<title>", "lead", [table], [("<caption>", "<svg/>")], [("Losses", ["x < y"]), ("Empty", [])])
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert "x &lt; y" in text
    assert "Empty" not in text
    assert "http" not in text
    assert "data:image/svg+xml;base64," in text
