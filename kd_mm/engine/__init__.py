"""The machinery of a step: terms, readers, the step itself."""
