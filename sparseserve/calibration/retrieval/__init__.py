"""Which heads retrieve: by copying needles, or by induction."""
