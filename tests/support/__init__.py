"""What tests of several rooms use: two processes, a terminal, mean scores."""
