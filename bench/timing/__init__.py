"""How a row is measured: candidates, clocks, memory, and the file that a run leaves."""
