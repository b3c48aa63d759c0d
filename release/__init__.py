"""From a checkpoint to a published folder."""
