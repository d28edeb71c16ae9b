"""Methods with a few vectors for each picture: slots, concepts."""
