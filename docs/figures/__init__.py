"""The figures of the method pages, docs/methods/<name>.png: what a method makes of the drawn scenes.

    python -m docs.figures [method ...]      # without a name: of all methods

A figure comes from a run of the project itself, kept as `runs/figures/<method>` (some minutes on a CPU core where it
has to be trained), so a second call draws alone. A new method adds a function to `docs/figures/methods.py`.
"""
