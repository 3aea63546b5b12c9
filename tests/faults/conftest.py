"""The nodes of the kernel lane: every fault ends with their check that nothing is left."""

from tests.kernel.conftest import each_backend, node, topology

__all__ = ["each_backend", "node", "topology"]
