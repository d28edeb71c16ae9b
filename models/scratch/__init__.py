"""Networks that are trained from nothing, with the method that stands on them."""
