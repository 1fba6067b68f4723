"""Questions with numbers as answers; each program is one question, `results/` keeps the answers."""
