"""The folder of a run and the files in it that say what was run, on what, and what came out."""
