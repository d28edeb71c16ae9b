"""Folders of people: where pictures and labels lie, which belong together, what the labels hold."""
