"""Methods that train the network itself on clusters of its own features, made anew in turn with the training."""
