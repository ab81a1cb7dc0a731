"""Real kills, signals, faults and damages. LONG_TESTS=1 (`make reliability`) does more of each."""
