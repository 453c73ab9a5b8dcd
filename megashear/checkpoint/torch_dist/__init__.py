"""torch_dist, the checkpoint format of Megatron-Core: read, written concurrently or streamed."""
