"""A run's configuration: frozen dataclasses, read from YAML, checked before anything starts."""
