"""Methods that end in a detector of objects."""
