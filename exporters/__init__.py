"""Totals and records to the outside. Exporters read what the meter and the ledger hold; none changes a job."""
