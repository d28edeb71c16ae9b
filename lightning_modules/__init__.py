"""One file a method; base.py is the house they share."""
