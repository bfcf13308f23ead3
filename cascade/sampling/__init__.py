"""From noise to video: times, steps, guidance, and the one loop."""
