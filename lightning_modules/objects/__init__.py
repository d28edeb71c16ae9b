"""Methods that begin with objects: masks first, found without labels, and classes of them after."""
