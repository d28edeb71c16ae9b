"""Taking out of frozen features what tells where in the picture a patch lies (`backbone.debias`)."""
