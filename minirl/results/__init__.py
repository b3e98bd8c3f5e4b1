"""Looking at what was learned: games, videos, a window, tables, curves and other pictures. Nothing here trains."""
