"""The reasoning tasks: problems solved in rounds. Importing them does not import numba.

Three are built in and compiled (arithmetic, edit distance, longest increasing subsequence), and
addition is one of plain Python.

## A task of one's own

A task is one class: the texts of a problem, of its rounds and of its answer.

```python
from relay_fast.tasks import TextTask


class Parity(TextTask):
    name, unit, shows = "parity", "number of rounds", "round"

    def sample(self, length, rng):
        bits = rng.integers(0, 2, length + 1).tolist()
        problem, rounds = " ".join(map(str, bits)), []
        while len(bits) > 1:
            bits = [bits[0] ^ bits[1], *bits[2:]]
            rounds.append(" ".join(map(str, bits)))
        return problem, rounds, rounds[-1]
```

Give it to `relay_fast.train.train(config, out, tasks=[Parity()])`, or name it in a TOML file. Four
questions decide whether the looped model learns it:

1. *What does one round do?* One small step, the same in each round. Iteration t learns round t.
2. *What must an iteration see?* With `feedback = "tokens"` an iteration has no memory: it sees the
   problem and the last round, or with `shows = "round"` the last round in the problem's place. What
   the next round needs must stand there: of the bits above, those that are left. A round that is
   only the parity so far would not say which bit comes next. Without feedback (`"none"`) the state
   goes on, as in the paper.
3. *Where does a token stand?* If both are seen, the round is right-aligned under the problem.
   `shown` may lay it out otherwise.
4. *What is new in a longer problem?* Distances, for one: `[tasks.NAME.feedback] cut` draws
   positions with gaps in training, so that no distance is unseen.

What else a task may say (tokens, answers, a solver for checking chains) is in `TextTask`. Data in a
file instead of a sampler: `RecordsTask`. A task in the package, or a compiled one:
`.github/CONTRIBUTING.md`.
"""

from __future__ import annotations

from relay_fast.tasks.arithmetic import Arithmetic
from relay_fast.tasks.base import NO_ANSWER, Task
from relay_fast.tasks.edit_distance import EditDistance
from relay_fast.tasks.feedback import FeedbackDraws, Inputs, Written
from relay_fast.tasks.lis import LIS
from relay_fast.tasks.records import RecordsTask
from relay_fast.tasks.registry import build_tasks, make_task, open_text_task, tasks_of_config
from relay_fast.tasks.samples import TASK_NAMES, Samples
from relay_fast.tasks.text import Sizes, TextTask
from relay_fast.tasks.vocabulary import Vocabulary

__all__ = [
    "LIS",
    "NO_ANSWER",
    "TASK_NAMES",
    "Arithmetic",
    "EditDistance",
    "FeedbackDraws",
    "Inputs",
    "RecordsTask",
    "Samples",
    "Sizes",
    "Task",
    "TextTask",
    "Vocabulary",
    "Written",
    "build_tasks",
    "make_task",
    "open_text_task",
    "tasks_of_config",
]
