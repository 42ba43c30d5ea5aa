import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay_fast.tasks import Vocabulary, vocabulary
from relay_fast.tasks.vocabulary import NUMBER0

VOCABULARY = Vocabulary()


def test_layout() -> None:
    texts = VOCABULARY.decode(range(VOCABULARY.n_tokens)).split()
    special = "<pad> <eos> [ARI] [ED] [LIS] = <sep> , | + - * / ( )".split()
    letters = [chr(ord("a") + i) for i in range(26)]
    assert texts == [*special, *letters, *map(str, range(250))]
    assert len(set(texts)) == len(texts)


def test_module_constants_are_the_ids() -> None:
    text = "<pad> <eos> [ARI] [ED] [LIS] = <sep> , | + - * / ( ) a z 0"
    v = vocabulary
    names = (v.PAD, v.EOS, v.ARITHMETIC, v.EDIT_DISTANCE, v.LIS, v.EQUALS, v.SEP, v.COMMA, v.BAR)
    signs = (v.PLUS, v.MINUS, v.TIMES, v.DIVIDE, v.LEFT, v.RIGHT)
    ends = (v.LETTER0, v.LETTER0 + v.N_LETTERS - 1, v.NUMBER0)
    assert VOCABULARY.encode(text) == [*names, *signs, *ends]


def test_sizes() -> None:
    assert (VOCABULARY.n_tokens, VOCABULARY.size) == (291, 320)
    assert Vocabulary(max_number=278).size == 320
    assert Vocabulary(max_number=279).size == 384
    assert Vocabulary(max_number=9, multiple=1).size == Vocabulary(max_number=9).n_tokens == 51


def test_numbers_are_contiguous_and_last() -> None:
    assert VOCABULARY.encode("0 249") == [NUMBER0, VOCABULARY.n_tokens - 1]
    assert VOCABULARY.is_number(NUMBER0)
    assert not VOCABULARY.is_number(NUMBER0 - 1)
    assert not VOCABULARY.is_number(VOCABULARY.n_tokens)


def test_aliases() -> None:
    assert VOCABULARY.encode("3 × 2 ÷ 1 − 0") == VOCABULARY.encode("3 * 2 / 1 - 0")


@given(st.lists(st.integers(0, VOCABULARY.n_tokens - 1)))
def test_round_trip(ids: list[int]) -> None:
    assert VOCABULARY.encode(VOCABULARY.decode(ids)) == ids


def test_rows_that_only_pad_are_readable() -> None:
    assert VOCABULARY.decode([1, 291, 319]) == "<eos> <unused> <unused>"


def test_config_round_trip() -> None:
    other = Vocabulary(max_number=99, multiple=8)
    assert Vocabulary.from_dict(other.to_dict()) == other != VOCABULARY


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Vocabulary(max_number=-1), "max_number is -1; give the largest number"),
        (lambda: Vocabulary(multiple=0), "multiple is 0; give at least 1"),
        (
            lambda: VOCABULARY.encode("1 + foo"),
            "unknown token 'foo' at position 2; known are <pad>",
        ),
        (lambda: VOCABULARY.encode("250"), "unknown token '250' at position 0; .*0..249"),
        (lambda: VOCABULARY.decode([0, 320]), "id 320 at position 1 is outside.*0 to 319"),
        (lambda: VOCABULARY.decode([-1]), "id -1 at position 0 is outside"),
        (
            lambda: Vocabulary.from_dict({"n": 1}),
            "unknown vocabulary parameter 'n'; known are max_",
        ),
    ],
)
def test_errors(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
