"""PriMaPs-EM (Hahn et al., TMLR 2024): the module, and the step of its offline stage."""
