"""Offline stages of methods: every step through a Trainer, cached on disk, and gone on with after a kill."""
