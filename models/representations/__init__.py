"""Networks of methods that learn dense representations."""
