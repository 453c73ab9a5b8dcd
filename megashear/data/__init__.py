"""Reading token files, and the dynamic blend of domains that a run draws from them."""
