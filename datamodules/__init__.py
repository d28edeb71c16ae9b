"""Data sets: pictures in, batches out. One file a data set (scenes/ a folder); base/ is what they share, files/ reads
pictures, own/ looks into people's own folders."""
