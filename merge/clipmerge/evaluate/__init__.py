"""Scores of weights on labelled images. `evaluator.Evaluator` is the door; README.md says what is not obvious."""
