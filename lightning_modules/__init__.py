"""One file a method; base/ is the house they share, families/ what a few share."""
