"""What a run will need, before it runs: memory, time and target shapes, by arithmetic."""
