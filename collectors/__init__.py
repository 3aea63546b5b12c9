"""Kernel -> readings: one module per kernel interface. Collectors read; they change nothing and keep no totals.

What every reader promises:

- A metric the kernel does not count here is absent from the readings. Absence is never 0.
- A cgroup that is gone gives no readings and no error.
- A known line that holds something else than a number raises `parse.MalformedFile`; unknown lines are skipped.
- `changes()` gives what changed since it was last asked, so an idle job costs its caller nothing; `read()` gives all.
  A dict once given is never written to again.
"""
