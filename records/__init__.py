"""Runs that count: reading logs, the statistics of comparisons, their reports and the leaderboard."""
