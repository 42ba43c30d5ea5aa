"""Tokenisers: ids equal those of the tokens one by one, texts come back, refusals."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest

from relay_fast.tasks.tokenisers import UNKNOWN, make_tokeniser

TEXTS = ["12 + 7 =", "", "a  b\tc\n", "né 🙂 12", "+"]
CUT = {
    "whitespace": [["12", "+", "7", "="], [], ["a", "b", "c"], ["né", "🙂", "12"], ["+"]],
    "characters": [list(text) for text in TEXTS],
    "bytes": [[f"<0x{byte:02X}>" for byte in text.encode()] for text in TEXTS],
}


@pytest.fixture
def library_file(tmp_path):
    """Words of a `tokenizers` file, cut at spaces; é is not among them."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"<unk>": 0, "12": 3, "+": 2, "7": 9, "=": 4, "a": 5, "b": 6, "c": 7, "🙂": 1}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.enable_padding(length=9)  # a file's padding is not wanted here
    made.enable_truncation(1)
    made.save(str(tmp_path / "words.json"))
    return str(tmp_path / "words.json")


def names(library_file: str) -> dict[str, list[list[str]]]:
    from_file = [[t if t != "né" else "<unk>" for t in own] for own in CUT["whitespace"]]
    return {**CUT, library_file: from_file}


@pytest.mark.parametrize("kind", [*CUT, "file"])
def test_tokens_and_ids(kind, library_file):
    name = library_file if kind == "file" else kind
    expected = names(library_file)[name]
    tokeniser = pickle.loads(pickle.dumps(make_tokeniser(name)))
    tokens, sizes = tokeniser.tokens(TEXTS)
    assert tokens == [token for own in expected for token in own]
    assert sizes.tolist() == [len(own) for own in expected]

    ids = {token: 3 * k + 7 for k, token in enumerate(sorted(set(tokens) - {"12"}))}
    found, again = tokeniser.encoder(ids)(TEXTS)
    assert found.dtype == np.int32 and again.tolist() == sizes.tolist()
    left_out = {"12", *"12"} if kind in ("whitespace", "file") else set()
    assert [ids.get(t, UNKNOWN) for t in tokens] == found.tolist()
    assert (found == UNKNOWN).any() == bool(left_out)
    empty, none = tokeniser.encoder(ids)([])
    assert len(empty) == len(none) == 0


@pytest.mark.parametrize("name", ["characters", "bytes"])
def test_a_character_beyond_those_known_is_unknown(name):
    tokeniser = make_tokeniser(name)
    tokens = tokeniser.tokens(["ab"])[0]
    encode = tokeniser.encoder({tokens[0]: 5, tokens[1]: 6, "<pad>": 0})
    assert encode(["ba🙂"])[0].tolist() == [6, 5] + [UNKNOWN] * (1 if name == "characters" else 4)
    assert tokeniser.encoder({"<pad>": 0})(["a"])[0].tolist() == [UNKNOWN]


def test_texts_come_back(library_file):
    for name in ("characters", "bytes"):
        tokeniser = make_tokeniser(name)
        for text in TEXTS:
            assert tokeniser.join(tokeniser.tokens([text])[0]) == text
    assert make_tokeniser("whitespace").join(["12", "+"]) == "12 +"
    assert make_tokeniser("bytes").join(["<0x61>", "<pad>", "<0xC3>"]) == "a<pad>\ufffd"
    assert make_tokeniser(library_file).join(["12", "<pad>", "a", "b"]) == "12 <pad> a b"


def test_identities(library_file, tmp_path):
    other = tmp_path / "other.json"
    content = json.loads(open(library_file).read())
    other.write_text(json.dumps(content))
    same, name = make_tokeniser(library_file), make_tokeniser(str(other))
    assert same.identity != name.identity  # the text of the file counts
    assert make_tokeniser("bytes").identity != make_tokeniser("characters").identity


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "words",
            r"tokeniser = 'words' is unknown: give \"whitespace\", \"characters\", \"bytes\"",
        ),
        ("/no/such.json", 'cannot be read .* give "whitespace"'),
        ("damaged.json", "is no file of the tokenizers library"),
    ],
)
def test_refusals(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "damaged.json").write_text("{}")
    with pytest.raises(ValueError, match=message):
        make_tokeniser(name)
