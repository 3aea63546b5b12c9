"""What the benchmarks hold the agent against: other programs on the very same jobs, started, weighed and ended."""
