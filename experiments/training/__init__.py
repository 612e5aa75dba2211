"""How runs are trained: schedules, disturbances, the engine, and where finished runs are stored."""
