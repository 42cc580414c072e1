"""From a model to the artifacts that policies load: measurements on transformers, the only users of it but the demo."""
