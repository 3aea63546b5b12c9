"""`python -m acctd`: the same as the `acctd` command."""

from acctd.cli.main import main

main()
