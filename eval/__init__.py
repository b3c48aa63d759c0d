"""What checkpoints know: bits per byte by language, and task suites."""
