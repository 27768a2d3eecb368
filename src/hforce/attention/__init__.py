"""How tokens attend: rotary positions, and dense attention over whole clips."""
