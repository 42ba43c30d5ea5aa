"""The (k⊗L) classifier: which layers it holds, how often it applies them, what it reads out."""

import pytest
import torch

from relay_fast.config import BlockConfig
from relay_fast.models.classifier import LoopedClassifier

BLOCK = BlockConfig(d_model=16, n_heads=2, n_layers=2, causal=True)


def model(**options) -> LoopedClassifier:
    torch.manual_seed(0)
    return LoopedClassifier(BLOCK, 7, **options)


@pytest.fixture
def tokens():
    return torch.randint(7, (3, 5))


def test_looping_is_a_stack_of_copies(tokens) -> None:
    looped, stack = model(loops=3), LoopedClassifier(BLOCK, 7, loops=1)
    deep = LoopedClassifier(BlockConfig(16, 2, 6, causal=True), 7, loops=1)
    for name in ("embedding", "norm", "head"):
        getattr(deep, name).load_state_dict(getattr(looped, name).state_dict())
    for i, layer in enumerate(deep.block.layers):
        layer.load_state_dict(looped.block.layers[i % 2].state_dict())
    torch.testing.assert_close(looped(tokens), deep(tokens))
    assert looped.parameter_count() == stack.parameter_count() < deep.parameter_count()


def test_ends_are_independent_layers(tokens) -> None:
    middle = model(loops=3, prelude=1, coda=2)
    assert [len(b.layers) for b in (middle.prelude, middle.block, middle.coda)] == [1, 2, 2]
    h = middle.prelude(middle.embedding(tokens), 1)
    torch.testing.assert_close(middle(tokens), middle.coda(middle.block(h, 3), 1))
    torch.testing.assert_close(middle(tokens, loops=5), middle.coda(middle.block(h, 5), 1))


def test_loss_is_cross_entropy_of_the_rows(tokens) -> None:
    m, rows, targets = model(loops=2), torch.tensor([0, 4, 14, 7]), torch.tensor([1, 2, 3, -1])
    states = torch.nn.functional.rms_norm(m(tokens).flatten(0, 1), (16,), m.norm.weight, 1e-6)
    logits = m.head(states[rows])
    loss, right = m.loss(tokens, rows, targets)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits[:3], targets[:3]))
    assert right == (logits.argmax(-1)[:3] == targets[:3]).float().mean()
    assert m.predict(tokens, rows).tolist() == logits.argmax(-1).tolist()


def test_packed_equals_padded(tokens) -> None:
    m = model(loops=2, prelude=1)
    packed = m(torch.cat([tokens[0], tokens[1, :3]]), cu_seqlens=[0, 5, 8])
    torch.testing.assert_close(packed[:5], m(tokens[:1])[0])
    torch.testing.assert_close(packed[5:], m(tokens[1:2, :3])[0])


def test_no_loops() -> None:
    with pytest.raises(ValueError, match="loops = 0: give at least 1"):
        model(loops=0)
