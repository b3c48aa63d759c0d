"""Settings of a run: schema, values in YAML groups, composition."""
