"""Runs, studies and their tables and figures, built on :mod:`bnsharp`."""
