"""`python -m pipeline` is the console script `rlhf`."""

from pipeline.cli import entry

entry()
