"""Text in, token files, and the dynamic blend of domains that a run reads."""
