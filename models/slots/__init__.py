"""Networks with a few vectors for a picture: its slots, concepts or prototypes."""
