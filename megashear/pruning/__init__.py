"""The mathematics of targeted structured pruning. Imports torch and `config`; never Megatron."""
