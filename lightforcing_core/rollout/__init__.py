"""The rollout: recipe, schedule, loop over chunks and steps, saved state, record."""
