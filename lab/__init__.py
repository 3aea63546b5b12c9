"""A small internet in network namespaces, an independent counter on its wires, and traffic of exactly known size.

What tests, benchmarks and the demo measure acctd against; therefore nothing here imports acctd. Not shipped.
"""
