"""Prompt files, the stream, region counts and generated prompts."""

import json
from collections import Counter
from pathlib import Path

import pytest

from varl.models.inkling.text import is_held_out, parse_prompt
from varl.policy import Prompt
from varl.prompts import (
    PromptStream,
    inkling_prompts,
    load_prompts,
    quoted_words,
    resolve_prompts,
    with_region_counts,
)

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def write(folder: Path, name: str, content: str) -> Path:
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return path


def test_text_file(tmp_path):
    path = write(tmp_path, "prompts.txt", "\ufeffa sign 'SALE'\r\n\n   \na mug \"Hi\u2028there\"\n")
    assert load_prompts(path) == [
        Prompt("a sign 'SALE'", ("SALE",)),
        Prompt('a mug "Hi\u2028there"', ("Hi\u2028there",)),
    ]


def test_jsonl_file(tmp_path):
    lines = [
        {"text": "a 'SIGN'"},
        {"text": "a 'SIGN'", "words": ["A", "B C"], "boxes": [[0, 0, 0.5, 0.25], [0.5, 0.5, 1, 1]]},
        {"text": "no 'word'", "words": []},
        {"label": 7},
    ]
    path = write(tmp_path, "prompts.jsonl", "\n\n".join(map(json.dumps, lines)))
    assert load_prompts(path) == [
        Prompt("a 'SIGN'", ("SIGN",)),
        Prompt("a 'SIGN'", ("A", "B C"), ((0.0, 0.0, 0.5, 0.25), (0.5, 0.5, 1.0, 1.0))),
        Prompt("no 'word'"),
        Prompt(label=7),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'text': 'x'}", "line 3: not valid JSON"),
        ("[1]", "line 3: expected an object, got list"),
        ('{"text": "x", "word": ["y"]}', "line 3: unknown field word"),
        ('{"text": "  "}', "line 3: there is neither a text nor a label"),
        ('{"text": 3}', "line 3: text must be a string, got 3"),
        ('{"text": "x", "words": "y"}', "line 3: words must be a list of texts, got 'y'"),
        ('{"text": "x", "words": [" "]}', "line 3: words must be a list"),
        ('{"text": "x", "words": ["y"], "boxes": [[0, 0, 2, 1]]}', "line 3: boxes must be"),
        ('{"text": "x", "words": ["y"], "boxes": [[0.5, 0, 0.5, 1]]}', "line 3: boxes must be"),
        ('{"text": "x", "words": ["y", "z"], "boxes": [[0, 0, 1, 1]]}', "line 3: there are 1 boxes for 2 words"),
        ('{"label": true}', "line 3: label must be a class index, got True"),
        ('{"text": "x", "words": ["A"], "words": ["B"]}', r"line 3: gives 'words' again, \['B'\] after \['A'\]"),
        ('{"text": "x", "text": "x"}', "line 3: gives 'text' again, 'x' after 'x'; a line"),
        ('{"label": 3, "label": 4}', "line 3: gives 'label' again, 4 after 3; a line"),
    ],
)
def test_jsonl_errors_name_the_line(tmp_path, line, message):
    path = write(tmp_path, "p.jsonl", '{"text": "good"}\n\n' + line)
    with pytest.raises(ValueError, match=message):
        load_prompts(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "holds no prompt"),
        ("a.txt", " \n\n", "holds no prompt"),
        ("a.jsonl", "\n", "holds no prompt"),
        ("a.json", '{"data_list": []}', "holds no prompt"),
        ("a.json", '{\n"data_list": [}', "line 2: not valid JSON"),
        ("a.json", "[]", "no list 'data_list'"),
        ("a.json", '{"data_list": [{"prompt": "x"}], "data_list": []}', "a.json: gives 'data_list' again"),
        ("a.json", '{"data_list": [{"prompt": "x", "prompt": "y"}]}', "json: gives 'prompt' again, 'y' after 'x'"),
        ("a.json", '{"data_list": [{"prompt": "x", "m": {"n": 1, "n": 2}}]}', "a.json: gives 'n' again, 2 after 1"),
        ("a.json", '{"data_list": [{"prompt": "x"}, {"text": "x"}]}', r"data_list\[1\] has no text 'prompt'"),
    ],
)
def test_file_errors(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        load_prompts(write(tmp_path, name, content))


def test_missing_or_binary_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no prompt file .*nowhere\.txt"):
        load_prompts(tmp_path / "nowhere.txt")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not UTF-8"):
        load_prompts(tmp_path / "b.txt")


def test_cvtg_format(tmp_path):
    entry = {"index": 0, "prompt": "a board 'SALE' and a cup 'Big Fresh'", "carrier_list": [], "sentence_list": []}
    path = write(tmp_path, "2.json", json.dumps({"data_list": [entry]}))
    assert load_prompts(path) == [Prompt(entry["prompt"], ("SALE", "Big Fresh"))]


@pytest.mark.skipif(not DATA.is_dir(), reason="the public prompt sets are not at ../shared/data")
def test_public_prompt_sets():
    prompts = [p for path in sorted(DATA.glob("cvtg2k/*/*.json")) for p in load_prompts(path)]
    assert len(prompts) == 2000
    assert sum(len(word.split()) for p in prompts for word in p.words) == 16206  # the benchmark's own count
    single = load_prompts(DATA / "flow_grpo_ocr" / "test.txt")
    assert len(single) == 1018
    assert all(len(p.words) == 1 for p in single)


PROMPTS = [Prompt(str(i)) for i in range(10)]


def texts(batch):
    return [prompt.text for _, prompt in batch]


def test_stream_epochs_are_new_permutations():
    stream = PromptStream(PROMPTS, seed=3)
    epochs = [texts(stream.next(10)) for _ in range(3)]
    assert all(sorted(epoch) == texts(enumerate(PROMPTS)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert texts(PromptStream(PROMPTS, seed=3).next(10)) == epochs[0]
    assert texts(PromptStream(PROMPTS, seed=4).next(10)) != epochs[0]


@pytest.mark.parametrize("size", [1, 3, 4, 7, 9, 10])
def test_stream_batches_repeat_nothing_and_epochs_miss_nothing(size):
    stream = PromptStream(PROMPTS, seed=1)
    batches = [stream.next(size) for _ in range(60)]
    assert all(len(set(texts(batch))) == size for batch in batches)
    flat = [pair for batch in batches for pair in batch]
    assert [number for number, _ in flat] == list(range(60 * size))
    for epoch in range(len(flat) // 10):
        assert sorted(texts(flat[10 * epoch : 10 * epoch + 10])) == texts(enumerate(PROMPTS))


def test_stream_larger_than_list():
    counts = Counter(texts(PromptStream(PROMPTS, seed=1).next(25)))
    assert set(counts.values()) == {2, 3}
    stream = PromptStream(PROMPTS, seed=1)
    stream.next(7)
    counts = Counter(texts(stream.next(13)))
    assert set(counts.values()) == {1, 2}  # 3 + 10: what the batch holds already comes late


@pytest.mark.parametrize("seed", range(5))
def test_a_batch_larger_than_the_list_repeats_nothing_within_a_list(seed):
    stream = PromptStream(PROMPTS, seed)
    stream.next(7)
    batch = texts(stream.next(25))  # epochs begin at 3, 13 and 23 of it
    for first in (0, 10, 20):
        assert len(set(batch[first : first + 10])) == len(batch[first : first + 10])
    assert stream.state_dict()["head"] == [int(text) for text in batch[23:]]  # what this batch took of the epoch


@pytest.mark.parametrize("sizes", [[4], [7], [10], [3, 8, 9]])
def test_stream_resumes(sizes):
    batches = [sizes[i % len(sizes)] for i in range(16)]
    whole = PromptStream(PROMPTS, seed=5)
    expected = [whole.next(n) for n in batches]
    for stop in range(len(batches)):
        first, second = PromptStream(PROMPTS, seed=5), PromptStream(PROMPTS, seed=5)
        for n in batches[:stop]:
            first.next(n)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert [second.next(n) for n in batches[stop:]] == expected[stop:]


def test_stream_refuses():
    with pytest.raises(ValueError, match="at least one prompt"):
        PromptStream([])
    stream = PromptStream(PROMPTS, seed=1)
    with pytest.raises(ValueError, match="at least one prompt, got 0"):
        stream.next(0)
    with pytest.raises(ValueError, match="had prompts 9, this one has 10"):
        stream.load_state_dict(PromptStream(PROMPTS[:9], seed=1).state_dict())
    with pytest.raises(ValueError, match="had seed 2, this one has 1"):
        stream.load_state_dict(PromptStream(PROMPTS, seed=2).state_dict())


def regions(**counts: int) -> list[Prompt]:
    return [Prompt(f"{k}/{i}", ("w",) * int(k[1:])) for k, n in counts.items() for i in range(n)]


@pytest.mark.parametrize(
    ("prompts", "target", "expected"),
    [
        # The paper's distribution: the 3 of 3 regions allow 10 in all.
        (regions(r2=9, r3=3, r4=9, r5=9, r1=4), {2: 0.2, 3: 0.3, 4: 0.3, 5: 0.2}, {2: 2, 3: 3, 4: 3, 5: 2}),
        (regions(r1=7, r2=100), {1: 1, 2: 3}, {1: 7, 2: 21}),
        (regions(r1=7, r2=100), {2: 1}, {2: 100}),
        (regions(r1=5, r2=5, r3=5), {1: 1, 2: 1, 3: 1}, {1: 5, 2: 5, 3: 5}),
        (regions(r1=5, r2=1), {1: 2, 2: 1}, {1: 2, 2: 1}),
        (regions(r1=2, r2=9), {1: 0.3, 2: 0.7}, {1: 2, 2: 4}),
        (regions(r1=7, r2=93), {1: 0.07, 2: 0.93}, {1: 7, 2: 93}),  # 7 / 0.07 is 99.99999999999999
        (regions(r1=2, r0=2), {0: 1, 1: 1, 5: 0}, {0: 2, 1: 2}),
    ],
)
def test_region_counts_follow_the_target(prompts, target, expected):
    chosen = with_region_counts(prompts, target, seed=0)
    assert Counter(len(p.words) for p in chosen) == expected
    where = [prompts.index(p) for p in chosen]
    assert where == sorted(set(where))


def test_region_counts_seed():
    prompts = regions(r1=5, r2=50)
    assert with_region_counts(prompts, {1: 1, 2: 1}, 0) == with_region_counts(prompts, {1: 1, 2: 1}, 0)
    assert with_region_counts(prompts, {1: 1, 2: 1}, 0) != with_region_counts(prompts, {1: 1, 2: 1}, 1)


def test_region_counts_refuse():
    with pytest.raises(ValueError, match="no prompt has 3 text regions; the prompts have 1, 2"):
        with_region_counts(regions(r1=2, r2=2), {1: 0.5, 3: 0.5})
    for bad in ({}, {1: 0.0}, {1: -1.0, 2: 2.0}, {1: float("nan")}):
        with pytest.raises(ValueError, match="region counts need shares"):
            with_region_counts(regions(r1=2), bad)


def test_inkling_prompts():
    train, held_out = inkling_prompts(300, 0), inkling_prompts(300, 0, held_out=True)
    for prompts, kept in ((train, False), (held_out, True)):
        assert len({p.text for p in prompts}) == 300
        assert all(is_held_out(word) == kept for p in prompts for word in p.words)
        assert all(tuple(r.word for r in parse_prompt(p.text)) == p.words == quoted_words(p.text) for p in prompts)
    assert inkling_prompts(10, 0) == train[:10]
    assert inkling_prompts(10, 1) != train[:10]
    with pytest.raises(ValueError, match="count must be at least 1"):
        inkling_prompts(0)


def test_resolve_prompts(tmp_path):
    assert resolve_prompts("inkling:train", count=5, seed=2) == inkling_prompts(5, 2)
    assert resolve_prompts("inkling:held-out", count=5, seed=2) == inkling_prompts(5, 2, True)
    chosen = resolve_prompts("inkling:train", count=60, region_counts={2: 1, 3: 1})
    assert Counter(len(p.words) for p in chosen)[2] == Counter(len(p.words) for p in chosen)[3] == len(chosen) / 2 > 5
    path = write(tmp_path, "p.txt", "a 'B'\nc\nd")
    assert resolve_prompts(path) == load_prompts(path)
    assert resolve_prompts(str(path), count=2) == load_prompts(path)
    with pytest.raises(ValueError, match="no prompts 'inkling:test'"):
        resolve_prompts("inkling:test")


def test_labels() -> None:
    assert [prompt.label for prompt in resolve_prompts("labels:3-6")] == [3, 4, 5, 6]
    assert resolve_prompts("labels:7-7") == [Prompt(label=7)]
    for wrong in ("6-3", "5", "a-b", ""):
        with pytest.raises(ValueError, match="first-last"):
            resolve_prompts(f"labels:{wrong}")
