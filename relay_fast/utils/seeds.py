"""Offsets that keep the random problems of training, evaluation and datasets apart.

Training uses 1000 times the run's seed plus the number of a stream; evaluation and datasets add a
large offset to their seed. (Short problems are few and still occur in several of them.)
"""

EVAL_SEED_OFFSET = 1 << 40
DATASET_SEED_OFFSET = 1 << 41
FILTER_SEED_OFFSET = 1 << 39  # beside that of evaluation: problems that set the filter's bound

# Numbers of the sample streams of a run.
TRAIN_STREAM, CHAINS_STREAM, IN_RANGE_STREAM, SELF_CHAINS_STREAM = 1, 2, 3, 4

RECIPE_TEST_STREAM = 2**32  # for test problems; the training of a recipe counts its steps from 0
