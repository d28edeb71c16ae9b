"""Picture files as they are: opened by safe decoders, set upright, their range of values, their shape."""
