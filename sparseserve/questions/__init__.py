"""Questions with one right answer, drawn from a seed: what calibration, evaluation and the demo ask."""
