"""The verbs of the command line, a module for each kind; cli.py lists them."""
