"""Files that others may have written or a disk may have spoilt: yaml, json, csv, zip, check sums."""
