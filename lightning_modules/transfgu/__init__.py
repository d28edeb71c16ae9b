"""TransFGU (Yin et al., ECCV 2022): the module, and the steps of its offline stage."""
