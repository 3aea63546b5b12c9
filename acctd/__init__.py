"""acctd: the accounting agent of a batch worker node. Start at ARCHITECTURE.md."""

__version__ = "0.1.0"
