"""The ground floor: what every other room may import, and which imports none of them."""
