"""Training of runs: schedules, disturbances, the engine, and the store of finished runs."""
