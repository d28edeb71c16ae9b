"""What a few methods share with each other."""
