"""The `marathon` command."""
