"""How weights move: optimizers, schedules, layer-wise rates, frozen parts."""
