"""Runs: folders, callbacks, and the functions behind the commands of run.py."""
