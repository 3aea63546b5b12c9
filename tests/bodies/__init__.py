"""Tests that mean the same on every cgroup layout: run on this host by tests/kernel, and in guests by tests/vm."""
