"""Offsets that keep the random problems of training, evaluation and datasets apart.

Training uses seeds below 2^40 (1000 times the run's seed plus a stream number); evaluation and
datasets add an offset to their seed, so that no problem is drawn twice.
"""

EVAL_SEED_OFFSET = 1 << 40
DATASET_SEED_OFFSET = 1 << 41

# Numbers of the sample streams of a run.
TRAIN_STREAM, CHAINS_STREAM, IN_RANGE_STREAM, SELF_CHAINS_STREAM = 1, 2, 3, 4

RECIPE_TEST_STREAM = 2**32  # for test problems; the training of a recipe counts its steps from 0
