"""The training of a run: ranks, loop, engine, checkpoints."""
