"""Options that check themselves: frozen dataclasses, shared by the library and the command line.

Nothing here imports torch, so that `minidiff VERB --help` answers at once.
"""
