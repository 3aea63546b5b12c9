"""Kernel -> readings: one module per kernel interface. Collectors read; they never change anything, and never add up.

What every reader promises:

- A metric the kernel does not count here is absent from the readings. Absence is never 0.
- A cgroup that is gone gives no readings and no error.
- A known line that holds something else than a number raises `parse.MalformedFile`; unknown lines are skipped.
- `read()` returns **the same dict object** as last time when nothing it reads has changed, so callers may skip an idle
  job by identity. A changed reading comes in a new dict; a dict once returned is never written to again.
"""
