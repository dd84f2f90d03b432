"""The machinery of a step: the hook, the distiller, the step, terms and readers."""
