"""Reference losses: what a model of a given size should come to on each domain."""
