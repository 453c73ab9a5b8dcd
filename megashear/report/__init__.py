"""Views of what was measured: plots. Never imports torch."""
