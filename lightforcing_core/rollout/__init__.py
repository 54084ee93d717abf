"""The rollout: schedule, loop over chunks and steps, saved state, record."""
