"""Prompts in tables, endings that are not known, and prompts without measure."""

import json
from pathlib import Path

import pytest

from varl.policy import Prompt
from varl.prompts import load_prompts


def write(folder: Path, name: str, content: str) -> Path:
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return path


TABLE = {
    "csv": 'Prompt,words,boxes,label\n"a sign, red, ""SALE""",,,\n'
    'a door,OPEN|SHUT,"[[0,0,0.5,1],[0.5,0,1,1]]",3\n\nx,[],,\n',
    "tsv": 'text\twords\tboxes\tlabel\n"a sign, red, ""SALE"""\t\t\t\n'
    'a door\t["OPEN", "SHUT"]\t[[0,0,0.5,1],[0.5,0,1,1]]\t3\nx\t[]\t\t',
}


@pytest.mark.parametrize("ending", [*TABLE, "CSV"])
def test_tables(tmp_path, ending):
    assert load_prompts(write(tmp_path, f"p.{ending}", "\ufeff" + TABLE[ending.lower()])) == [
        Prompt('a sign, red, "SALE"', ("SALE",)),
        Prompt("a door", ("OPEN", "SHUT"), ((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)), 3),
        Prompt("x"),
    ]
    assert [p.label for p in load_prompts(write(tmp_path, "labels.csv", "label\n3\n4\n"))] == [3, 4]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a sign 'SALE'\na door 'OPEN'\n", "line 1: the first line must name the columns"),
        ("text,word\na,b\n", "the first line must name the columns.*'word'"),
        ("text,prompt\na,b\n", "each once"),
        ("text,words\na,b,c\n", "line 2: 3 cells in 2 columns"),
        ("text,words\na\n", "line 2: 1 cells in 2 columns"),
        ('text,words\na,"[1"\n', "line 2: words is not valid JSON"),
        ("text,label\na,seven\n", "line 2: label is not valid JSON"),
        ("text,label\n,\na,-1\n", "line 3: label must be a class index, got -1"),
        ('text\n"a\n', "line 2: unexpected end of data"),
        ("words\na\n", "the first line must name the columns"),
        ("text\n", "holds no prompt"),
        ("", "the first line must name the columns"),
    ],
)
def test_table_errors_name_the_line(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        load_prompts(write(tmp_path, "p.csv", content))


@pytest.mark.parametrize("name", ["p.parquet", "p.yaml", "p.xlsx", "p.md"])
def test_other_endings_are_refused(tmp_path, name):
    with pytest.raises(
        ValueError, match=r"has the ending \.\w+; prompts are read from \.txt, \.jsonl, \.json, \.csv, \.tsv"
    ):
        load_prompts(write(tmp_path, name, "a"))
    assert load_prompts(write(tmp_path, "p", "a")) == load_prompts(write(tmp_path, "p.TXT", "a")) == [Prompt("a")]


LONG = {
    "a.txt": ("a\n" + "x" * 100_000, "line 2: a prompt has at most 20,000 characters, this one has 100,000"),
    "b.txt": ("'a' " * 3000, "line 1: a prompt has at most 256 wanted words, this one has 3,000"),
    "a.jsonl": (json.dumps({"text": "a", "words": ["b"] * 3000}), "at most 256 wanted words, this one has 3,000"),
    "b.jsonl": (json.dumps({"text": "a", "words": ["b" * 2000]}), "at most 1,000 characters in one wanted text"),
    "a.json": (json.dumps({"data_list": [{"prompt": "x" * 30_000}]}), r"data_list\[0\]: a prompt has at most 20,000"),
    "a.csv": ("text\n" + "x" * 100_000, "line 2: a prompt has at most 20,000"),
}


@pytest.mark.parametrize("name", LONG)
def test_prompts_without_measure_are_refused(tmp_path, name):
    content, message = LONG[name]
    with pytest.raises(ValueError, match=message):
        load_prompts(write(tmp_path, name, content))
