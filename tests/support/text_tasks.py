"""Small tasks of plain Python."""

from __future__ import annotations

from relay_fast.tasks import TextTask, Vocabulary

VALUE = 1
VOCABULARY = Vocabulary(63, 1, ("[parity]", "[reversal]", "[addition]", "[folded]", *"abc01+="))


class Parity(TextTask):
    """Bits, and after each of them whether the ones so far are odd."""

    name = "parity"
    unit = "number of bits"

    def sample(self, length, rng):
        problem = " ".join(str(bit) for bit in rng.integers(0, 2, length))
        return problem, *self.solve(problem)

    def solve(self, problem):
        rounds, odd = [], 0
        for bit in problem.split():
            odd ^= int(bit)
            rounds.append(str(odd))
        return rounds, rounds[-1]

    def length_of(self, problem):
        return len(problem.split())


class Total(TextTask):
    """Digits, and the sum after each of them, written in characters."""

    name = "total"
    answer_is = "round"

    def __init__(self, base: int = 10) -> None:
        self.base = base

    def sample(self, length, rng):
        digits = rng.integers(0, self.base, length).tolist()
        rounds = [str(sum(digits[: k + 1])) for k in range(length)]
        return "+".join(map(str, digits)), rounds, rounds[-1]

    def tokenize(self, text):
        return list(text)

    def detokenize(self, tokens):
        return "".join(tokens)


class Reversal(TextTask):
    """Letters, of which each round writes the last one that is left."""

    name = "reversal"
    tokens = ("a", "b", "c")

    def sample(self, length, rng):
        letters = [self.tokens[k] for k in rng.integers(0, 3, length)]
        return " ".join(letters), letters[::-1], letters[0]

    def shown(self, problem, rounds):
        letters = problem.split()
        return " ".join(letters[: len(letters) - len(rounds)]), ""


class Folded(TextTask):
    """Bits, of which each round replaces the first two by their sum: all that is left is there."""

    name = "folded"
    shows = "round"
    min_length = 2

    def sample(self, length, rng):
        bits = rng.integers(0, 2, length).tolist()
        texts = [[sum(bits[:k]) % 2, *bits[k:]] for k in range(1, length + 1)]
        problem, *rounds = (" ".join(map(str, text)) for text in texts)
        return problem, rounds, rounds[-1]
