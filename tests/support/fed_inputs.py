"""What an iteration with feedback sees, one sample at a time, from the tasks' words alone."""

from relay_fast.tasks import Task
from relay_fast.tasks.vocabulary import BAR, COMMA, LETTER0, NUMBER0, PAD


def naive_inputs(
    task: Task, problem: list[int], texts: list[list[int]], width: int = 0, gap: int = 0
) -> tuple[list[int], list[int], list[int]]:
    """tokens, fed and positions after the rounds `texts`; width: of the input, 0 for the least."""
    body = texts[-1] if texts and task.name == "arithmetic" else problem[1:]
    least = 0 if task.name == "arithmetic" else task.min_input_tokens
    n = width or max(len(body) + 1, least)
    tokens = [task.token, *[PAD] * (n - len(body) - 1), *body]
    fed, positions = [PAD] * n, list(range(n))
    if task.name == "edit_distance":
        bar = len(tokens) - 1 - tokens[::-1].index(BAR)
        second = n - bar - 2
        if texts:
            for k, cell in enumerate(texts[-1][-second - 1 :][::-1]):
                fed[n - 1 - k] = cell
        else:
            fed[bar + 1 : n - 1] = [NUMBER0 + j + 1 for j in range(second)]
        fed[bar] = NUMBER0 + len(texts)
        first = body.index(BAR)
        for k in range(first):
            if k <= len(texts):
                fed[bar - first + k] = COMMA if k < len(texts) else BAR
        positions = [p + gap if p >= bar else p for p in positions]
    if task.name == "lis":
        lengths: list[int] = []
        for text in texts:
            padded = [PAD] * (task.group + 1) + text
            lengths += padded[len(padded) - task.group - 1 : -1]
        values = len(body) - 1
        lengths = lengths[:values]
        marks = [LETTER0 + k for k in range(min(task.group, values - len(lengths)))]
        start = n - len(body)
        fed[start : start + len(lengths) + len(marks)] = lengths + marks
        positions = [max(0, p - (n - task.group - 2)) for p in positions]
    return tokens, fed, positions
