"""Benchmarks: what acctd costs, as a ratio to a peer that does the same and ran in the same minutes. Not installed."""
