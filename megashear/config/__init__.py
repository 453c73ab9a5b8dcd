"""The configuration of a run: frozen dataclasses, read from YAML, checked before anything starts."""
