"""How tokens attend: rotary positions, backends for ragged heads, and dense attention over whole clips."""
