"""Methods that train a network by the mutual information of what it says of a picture and of its changed copy."""
