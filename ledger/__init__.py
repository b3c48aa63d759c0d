"""What a run did: the append-only record and the facts of its host."""
