"""The dashboards of dashboards/, made from one declaration: `python -m tools.grafana` writes them anew.

numbers.py names what is shown, intents.py says what is asked of it, influxql.py, flux.py and promql.py put that into
words, panels.py is how it looks, jobs.py, boards.py, bills.py and
agents.py hold the dashboards, parts.py what they share, document.py makes Grafana's JSON of them.
"""
