"""Files of records: read lazily by an index, whatever their source; each fault with its line."""

from __future__ import annotations

import gzip
import json
import os
import pickle

import numpy as np
import pytest

from relay_fast.tasks.record_files import Record, RecordsChanged, cache_folder, open_source
from relay_fast.tasks.record_index import open_index
from relay_fast.tasks.record_rules import Rules
from relay_fast.tasks.record_survey import BLOCK, place_of_token
from relay_fast.tasks.tokenisers import make_tokeniser

WORDS = make_tokeniser("whitespace")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Nothing is written into the caller's home."""
    monkeypatch.setenv("RELAY_FAST_CACHE", str(tmp_path / "cache"))


def record(length: int, k: int = 0) -> dict:
    rounds = [f"{k} r{t} é" for t in range(length)]
    return {"problem": f"p {k} {'x ' * length}", "rounds": rounds, "answer": "é"}


def write(path, values, text=json.dumps) -> str:
    path.write_text("".join(text(value) + "\n" for value in values), encoding="utf-8")
    return str(path)


def index_of(data, **rules):
    return open_index(open_source(data), WORDS, Rules(**rules))


def test_records_by_position_and_length(tmp_path):
    rng = np.random.default_rng(0)
    number = BLOCK + 37  # more than one block
    lengths = rng.integers(1, 6, number).tolist()
    values = [record(length, k) for k, length in enumerate(lengths)]
    values[5] |= {"length": 9, "rounds": None, "answer": None}
    text = lambda value: json.dumps(value, ensure_ascii=len(value["problem"]) % 2 == 0)
    index = index_of(write(tmp_path / "r.jsonl", values, text))
    lengths[5] = 9
    assert len(index) == number
    chosen = rng.permutation(number)[:50]
    fields = ("problem", "rounds", "answer", "length")
    expected = [Record(*(values[i].get(name) for name in fields), None) for i in chosen]
    assert index.read(chosen) == expected
    again = pickle.loads(pickle.dumps(index))
    assert again.read(chosen) == expected
    for length in (1, 2, 3, 4, 5, 9, 77):
        at = [i for i, own in enumerate(lengths) if own == length]
        assert index.of_length(length).tolist() == at
        assert not at or index.facts.lengths[length].records == len(at)
    assert not index.rows["solved"][5] and index.rows["solved"].sum() == number - 1
    assert index.rows["loops"].tolist() == lengths
    assert len(set(index.rows["digest"].tolist())) == number


def test_an_index_is_made_once(tmp_path):
    path = write(tmp_path / "r.jsonl", [record(1), record(2)])
    first = index_of(path)
    made = {file: file.stat().st_mtime_ns for file in cache_folder().rglob("*") if file.is_file()}
    assert index_of(path).rows.tolist() == first.rows.tolist()
    now = {file: file.stat().st_mtime_ns for file in cache_folder().rglob("*") if file.is_file()}
    assert now == made and len(made) == 3
    index_of(path, long_rounds="split")  # other rules need another
    write(tmp_path / "r.jsonl", [record(3)])
    assert len(index_of(path)) == 1  # and so does another file


def test_every_source_gives_the_same_records(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    values = [record(1 + k % 3, k) for k in range(9)]
    values[4] = {"problem": "p p p", "length": 4}
    write(tmp_path / "r.jsonl", values)
    table = pyarrow.Table.from_pylist([{"id": 0, "length": None, **value} for value in values])
    parquet.write_table(table, tmp_path / "r.parquet", row_group_size=2)
    numpy_numbers = [
        {**v, "length": np.int64(v.get("length", len(v.get("rounds", []))))} for v in values
    ]
    every = np.arange(9)
    expected = index_of(tmp_path / "r.jsonl").read(every)
    assert index_of(tmp_path / "r.parquet").read(every) == expected
    assert index_of(values).read(every) == expected
    assert index_of(iter(values)).read(every) == expected
    assert [r[:3] for r in index_of(numpy_numbers).read(every)] == [r[:3] for r in expected]
    assert index_of(tmp_path / "r.parquet").place(3) == f"{tmp_path / 'r.parquet'}, row 4"


def test_sizes_count_what_the_task_adds(tmp_path):
    values = [
        {"problem": "a b", "rounds": ["c d", "e"], "answer": "e"},
        {"problem": "a b c", "rounds": ["c", "d e f"], "answer": "f", "length": 2},
        {"problem": "a b c d", "length": 5},
    ]
    facts = index_of(values).facts
    two, five = facts.lengths[2], facts.lengths[5]
    assert vars(two) == dict(records=2, solved=2, loops=2, problem=5, round=4, chain=6)
    assert vars(five) == dict(records=1, solved=0, loops=5, problem=6, round=0, chain=0)
    assert facts.tokens == list("abcdef")
    assert facts.long_rounds == 0  # 4 tokens and a <pad> fit into 5


@pytest.mark.parametrize(("long_rounds", "loops", "longest"), [("pad", 2, 6), ("split", 3, 3)])
def test_long_rounds_are_counted(long_rounds, loops, longest):
    # Input of 4 tokens: a round may have 3, its own delimiter included; 6 make two.
    values = [{"problem": "a b", "rounds": ["c d e f g", "h"], "answer": "h", "length": 2}]
    index = index_of(values, long_rounds=long_rounds)
    assert index.rows["loops"].tolist() == [loops]
    sizes = index.facts.lengths[2]
    assert (sizes.loops, sizes.round, sizes.chain) == (loops, longest, 8)
    assert index.facts.long_rounds == 1


GOOD = {"problem": "a b", "rounds": ["c d"], "answer": "d"}


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"problem": "a"', "is not JSON (Expecting ',' delimiter): write one object a line"),
        (b"", "is blank: remove the line"),
        (b"\xef\xbb\xbf{}", "begins with a byte order mark: save the file as UTF-8 without it"),
        (b"[1]", "holds a list: write one object a line"),
        (b"3", "holds the number 3: write one object a line"),
        (b"[" * 100_000, "is nested too deeply to be a record"),
        (
            b'{"problem": "\xe9"}',
            "is not UTF-8 (byte 0xe9 at column 14): convert the file to UTF-8",
        ),
        (b'{"problem": "\\ud83d"}', "has half of a surrogate pair (\\ud…): write whole characters"),
        ({"rounds": ["a"], "answer": "a"}, 'has no field "problem": write the problem as a text'),
        (b'{"problem": "a", "problem": "b"}', 'has "problem" twice: write it once'),
        (GOOD | {"problem": 3}, 'has the number 3 as "problem": write a text'),
        (GOOD | {"rounds": "c d"}, 'has a text as "rounds": write a list of texts'),
        (GOOD | {"rounds": []}, 'has no round: write at least one, or leave "rounds" out'),
        (GOOD | {"rounds": ["c", None]}, "has null as round 2: write a text"),
        (GOOD | {"answer": 4}, 'has the number 4 as "answer": write a text'),
        (GOOD | {"length": True}, 'has True as "length": write a whole number of at least 1'),
        (GOOD | {"length": 0}, 'has 0 as "length": write a whole number of at least 1'),
        (GOOD | {"loops": 2}, 'has 1 rounds and "loops" 2: leave "loops" out'),
        ({"problem": "a"}, 'has neither "rounds" nor "length": write how many rounds it needs'),
        (GOOD | {"problem": " "}, "has an empty problem: write it, or leave it out"),
        (GOOD | {"rounds": ["c d", " "]}, "has an empty round 2: write it, or leave it out"),
        (GOOD | {"answer": ""}, "has an empty answer: write it, or leave it out"),
        (
            GOOD | {"rounds": ["<pad> d"]},
            "has the token '<pad>', which is kept for the model: write it otherwise",
        ),
        (
            GOOD | {"rounds": ["a a a a d"]},
            "has a round of 5 tokens, more than max_round_tokens = 4: shorten it, or allow longer "
            "ones",
        ),
        (
            GOOD | {"answer": "c"},
            "has the answer 'c', but its last round ends with 'd': correct one, or set "
            'answer_is = "round" if the answer is the whole last round, "added" to make a last '
            "round of it",
        ),
        (
            {"problem": "a", "length": 4},
            'has neither "rounds" nor "loops", and its length does not say how many rounds it '
            'needs: in line 2 the length is not the number of rounds; add "loops"',
        ),
    ],
)
def test_each_fault_is_one_sentence_with_its_line(tmp_path, line, why):
    if isinstance(line, dict):
        line = json.dumps(line).encode()
    good = [json.dumps(GOOD).encode(), json.dumps(GOOD | {"length": 7}).encode()]
    (tmp_path / "r.jsonl").write_bytes(b"\n".join([*good, line, json.dumps(GOOD).encode(), b""]))
    rules = {"reserved": ("<pad>",), "max_round_tokens": 4}
    with pytest.raises(ValueError) as caught:
        index_of(tmp_path / "r.jsonl", **rules)
    assert str(caught.value) == f"{tmp_path / 'r.jsonl'}, line 3 {why}"
    assert not [file for file in cache_folder().iterdir()]  # nothing half made


def test_an_answer_may_be_a_round(tmp_path):
    whole = [GOOD | {"answer": "c d"}]
    assert len(index_of(whole, answer_is="round")) == 1
    with pytest.raises(ValueError, match="has the answer 'd', but its last round is 'c d'"):
        index_of([GOOD], answer_is="round")
    values = [GOOD | {"answer": "c"}, {"problem": "p", "length": 3}, GOOD, GOOD | {"answer": None}]
    index = index_of(values, answer_is="added")
    assert [r.rounds for r in index.read(np.arange(4))] == [["c d", "c"], None, ["c d", "d"], None]
    assert index.rows["length"].tolist() == [1, 3, 1, 1]
    assert index.rows["loops"].tolist() == [2, 4, 2, 2]
    assert index.rows["solved"].tolist() == [True, False, True, False]
    assert index.facts.other_loops == -1


def test_a_token_is_found_again(tmp_path):
    path = write(tmp_path / "r.jsonl", [record(1), GOOD, GOOD])
    assert place_of_token(open_source(path), WORDS, {"c", "z"}) == (f"{path}, line 2", "c")


def test_records_in_memory_are_refused_by_their_number():
    with pytest.raises(ValueError, match="^data, record 2 has no field"):
        index_of([GOOD, {}])
    with pytest.raises(ValueError, match="^data, record 1 is a text, not a mapping"):
        index_of(["a"])
    with pytest.raises(ValueError, match="^data is int: give a path, or an iterable of records"):
        index_of(3)
    with pytest.raises(ValueError, match="holds no records"):
        index_of([])


def test_a_path_is_refused_before_it_is_read(tmp_path):
    with pytest.raises(ValueError, match="'no.jsonl' does not exist: give a file of records"):
        index_of("no.jsonl")
    with pytest.raises(ValueError, match="is a folder: give a file of records"):
        index_of(tmp_path)
    pytest.importorskip("pyarrow")
    (tmp_path / "r.parquet").write_bytes(b"no")
    with pytest.raises(ValueError, match="r.parquet cannot be read as Parquet"):
        index_of(tmp_path / "r.parquet")


def test_a_file_that_changes_is_noticed(tmp_path):
    path = tmp_path / "r.jsonl"
    index = index_of(write(path, [record(1), record(2)]))
    index.read(np.array([0]))
    os.utime(path, ns=(0, 0))
    with pytest.raises(RecordsChanged, match="r.jsonl has changed since this run read it first"):
        index.read(np.array([0]))
    path.unlink()
    with pytest.raises(RecordsChanged):
        pickle.loads(pickle.dumps(index)).read(np.array([1]))


def test_equal_tokens_are_equal_problems():
    """Two problems that a model sees as the same have one digest, which decides what is kept for
    evaluation and counts duplicates."""
    values = [GOOD | {"problem": text} for text in ("a b", " a\tb  ", "ab", "a  b c")]
    digest = lambda name: open_index(
        open_source(values), make_tokeniser(name), Rules(answer_is="added")
    )
    words, letters, octets = (
        digest(name).rows["digest"].tolist() for name in ("whitespace", "characters", "bytes")
    )
    assert words[0] == words[1] and len(set(words)) == 3
    assert len(set(letters)) == 4  # there a space is a token
    assert letters == octets and letters[0] == words[0]  # that of the text itself


def test_a_tokeniser_that_loses_a_part_is_refused(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    models, split = tokenizers.models, tokenizers.pre_tokenizers.WhitespaceSplit()
    letters = {letter: k for k, letter in enumerate("abcd")}
    path = write(tmp_path / "r.jsonl", [GOOD, GOOD | {"problem": "a é"}])
    for made, why in (
        (models.BPE(letters, []), "whose 'é' the tokeniser leaves out"),
        (
            models.WordLevel(letters | {"<unk>": 4}, unk_token="<unk>"),
            "for a part of which .* has only '<unk>'",
        ),
        (
            models.Unigram([(letter, -1.0) for letter in ("<unk>", *"abcd")], unk_id=0),
            "for a part of which .* has only '<unk>'",
        ),
        (models.WordLevel(letters), r"which the tokeniser cannot cut \(.*\)"),
    ):
        library = tokenizers.Tokenizer(made)
        library.pre_tokenizer = split
        library.save(str(tmp_path / "t.json"))
        tokeniser = make_tokeniser(str(tmp_path / "t.json"))
        with pytest.raises(
            ValueError, match=f"r.jsonl, line 2 has the text 'a é', {why}: write it"
        ):
            open_index(open_source(path), tokeniser, Rules())
        write(tmp_path / "good.jsonl", [GOOD])
        assert len(open_index(open_source(tmp_path / "good.jsonl"), tokeniser, Rules())) == 1


def test_a_character_that_is_meant_to_vanish_may(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    library = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "d": 2}, []))
    library.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    library.normalizer = tokenizers.normalizers.Replace("c", "")
    library.save(str(tmp_path / "t.json"))
    index = open_index(open_source([GOOD]), make_tokeniser(str(tmp_path / "t.json")), Rules())
    assert index.facts.tokens == ["a", "b", "d"]


def test_arrays_are_lists(tmp_path):
    every = np.arange(1)
    assert index_of([GOOD | {"rounds": np.array(["c d"])}]).read(every) == index_of([GOOD]).read(
        every
    )
    with pytest.raises(ValueError, match='^data, record 1 has a set as "rounds": write a list of'):
        index_of([GOOD | {"rounds": {"c d"}}])


def test_a_file_is_known_by_how_it_begins(tmp_path):
    packed = tmp_path / "r.jsonl"
    packed.write_bytes(gzip.compress(b"{}"))
    with pytest.raises(ValueError, match="r.jsonl is packed by gzip: unpack it"):
        index_of(packed)
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([GOOD]), tmp_path / "r.table")
    assert len(index_of(tmp_path / "r.table")) == 1
