"""The training loop, its objectives, evaluation and the record of a run."""
