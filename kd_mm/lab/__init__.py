"""Looking without training: configs, models, one step, cost."""
