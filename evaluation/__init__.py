"""The shared evaluation: probes, their read-out, matching and scores. Pictures and tables of them are reporting/."""
