"""What tests of several rooms use: programs and ranks in processes, a terminal, pages, mean scores."""
