"""The shared evaluation: probes, their read-out, matching, scores, pictures and tables."""
