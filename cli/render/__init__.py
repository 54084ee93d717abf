"""`lightforcing render`: many videos on one machine or on a Ray cluster, each rendered once, whole or not at all."""
