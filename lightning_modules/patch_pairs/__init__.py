"""Methods that train a network by pairs of patches of one picture, as IIC's authors ran them for their tables."""
