"""What `megashear doctor` checks; every check returns Findings. Never imports torch or Megatron."""
