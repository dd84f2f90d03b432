"""Pure tensor functions and small helpers: they know no host and no loss."""
